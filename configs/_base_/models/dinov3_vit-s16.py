# ViT-S/16 of DINOv3 with four registers, pre-trained on LVD-1689M without labels.
# Positions are rotations: another size of images needs nothing but img_size. Meta sends the file's address on request,
# https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/; its name ends in digits of its SHA-256.
model = dict(
    name="vit_small_patch16_dinov3",
    kwargs=dict(img_size=224, global_pool="token", drop_path_rate=0.1),
    checkpoint="checkpoints/dinov3_vits16_pretrain_lvd1689m-08c60483.pth",
    sha256="08c60483",
    normalize="imagenet",
)
