# ViT-g/14 of DINOv2 with four registers, pre-trained on LVD-142M without labels.
# https://dl.fbaipublicfiles.com/dinov2/dinov2_vitg14/dinov2_vitg14_reg4_pretrain.pth
# It was trained for 518 x 518 pixels last: position embeddings are resampled to 16 x 16 places.
model = dict(
    name="vit_giant_patch14_reg4_dinov2",
    kwargs=dict(img_size=224, drop_path_rate=0.1),
    checkpoint="checkpoints/dinov2_vitg14_reg4_pretrain.pth",
    normalize="imagenet",
)
