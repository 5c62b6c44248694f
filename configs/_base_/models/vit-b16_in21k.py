# ViT-B/16 pre-trained on ImageNet-21k: the backbone of SPT, NOAH and VPT. SSF takes AugReg's instead.
# https://storage.googleapis.com/vit_models/imagenet21k/ViT-B_16.npz
# The same in timm's names: model.safetensors of timm/vit_base_patch16_224.orig_in21k on the Hugging Face hub.
# Drop-path: SPT's scripts leave train_spt.py's default, 0.1, and so do NOAH's; VPT has none.
model = dict(
    name="vit_base_patch16_224",
    kwargs=dict(drop_path_rate=0.1),
    checkpoint="checkpoints/ViT-B_16.npz",
    normalize="inception",
)
