# ConvNeXt-B, pre-trained on ImageNet-22k: https://dl.fbaipublicfiles.com/convnext/convnext_base_22k_224.pth
# Pooling: the mean over all places, then the pre-trained norm, as ConvNeXt is made.
model = dict(
    name="convnext_base",
    kwargs=dict(drop_path_rate=0.1),
    checkpoint="checkpoints/convnext_base_22k_224.pth",
    normalize="imagenet",
)
