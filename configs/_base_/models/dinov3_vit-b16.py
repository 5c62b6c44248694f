# ViT-B/16 of DINOv3 with four registers, pre-trained on LVD-1689M without labels.
# Positions are rotations: another size of images needs nothing but img_size. Meta sends the file's address on request,
# https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/; its name ends in digits of its SHA-256.
model = dict(
    name="vit_base_patch16_dinov3",
    kwargs=dict(img_size=224, global_pool="token", drop_path_rate=0.1),
    checkpoint="checkpoints/dinov3_vitb16_pretrain_lvd1689m-73cec8be.pth",
    sha256="73cec8be",
    normalize="imagenet",
)
