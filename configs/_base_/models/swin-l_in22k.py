# Swin-L with windows of 7 x 7, pre-trained on ImageNet-22k.
# https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_large_patch4_window7_224_22k.pth
# Pooling: the mean over all places behind the last norm, as Swin is made.
model = dict(
    name="swin_large_patch4_window7_224",
    kwargs=dict(drop_path_rate=0.1),
    checkpoint="checkpoints/swin_large_patch4_window7_224_22k.pth",
    normalize="imagenet",
)
