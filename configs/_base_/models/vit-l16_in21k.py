# ViT-L/16 pre-trained on ImageNet-21k: https://storage.googleapis.com/vit_models/imagenet21k/ViT-L_16.npz
# The same in timm's names: model.safetensors of timm/vit_large_patch16_224.orig_in21k on the Hugging Face hub.
model = dict(
    name="vit_large_patch16_224",
    kwargs=dict(drop_path_rate=0.1),
    checkpoint="checkpoints/ViT-L_16.npz",
    normalize="inception",
)
