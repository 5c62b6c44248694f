# ViT-B/16 of MoCo v3, pre-trained on ImageNet-1k without labels: the file that SPT and VPT take. Its backbone stayed as
# it was while its head was trained, so vit-b-300ep.pth.tar beside it has the same.
# https://dl.fbaipublicfiles.com/moco-v3/vit-b-300ep/linear-vit-b-300ep.pth.tar
# As SPT uses it: class token and the pre-trained norm.
model = dict(
    name="vit_base_patch16_224",
    kwargs=dict(drop_path_rate=0.1),
    checkpoint="checkpoints/linear-vit-b-300ep.pth.tar",
    normalize="imagenet",
)
