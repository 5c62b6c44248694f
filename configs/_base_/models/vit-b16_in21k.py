# ViT-B/16 pre-trained on ImageNet-21k (ViT-B_16.npz): the backbone of NOAH, VPT and SPT. SSF takes AugReg's instead.
# The file is model.safetensors of timm/vit_base_patch16_224.orig_in21k on the Hugging Face hub.
# Drop-path: SPT's scripts leave train_spt.py's default, 0.1, and so do NOAH's; VPT has none.
model = dict(
    name="vit_base_patch16_224",
    kwargs=dict(drop_path_rate=0.1),
    checkpoint="checkpoints/vit_base_patch16_224.orig_in21k.safetensors",
)
