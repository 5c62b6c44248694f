# DeiT-B/16, trained on ImageNet-1k. The file's name ends in the first digits of its SHA-256.
# https://dl.fbaipublicfiles.com/deit/deit_base_patch16_224-b5f2ef4d.pth
model = dict(
    name="deit_base_patch16_224",
    kwargs=dict(drop_path_rate=0.1),
    checkpoint="checkpoints/deit_base_patch16_224-b5f2ef4d.pth",
    sha256="b5f2ef4d",
    normalize="imagenet",
)
