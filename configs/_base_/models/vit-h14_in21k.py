# ViT-H/14 pre-trained on ImageNet-21k: https://storage.googleapis.com/vit_models/imagenet21k/ViT-H_14.npz
# The same in timm's names: model.safetensors of timm/vit_huge_patch14_224.orig_in21k on the Hugging Face hub.
model = dict(
    name="vit_huge_patch14_224",
    kwargs=dict(drop_path_rate=0.1),
    checkpoint="checkpoints/ViT-H_14.npz",
    normalize="inception",
)
