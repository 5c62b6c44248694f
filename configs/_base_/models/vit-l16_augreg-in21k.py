# ViT-L/16 of AugReg, pre-trained on ImageNet-21k. The file is below
# https://storage.googleapis.com/vit_models/augreg/
# The same in timm's names: model.safetensors of timm/vit_large_patch16_224.augreg_in21k on the Hugging Face hub.
model = dict(
    name="vit_large_patch16_224",
    kwargs=dict(drop_path_rate=0.1),
    checkpoint="checkpoints/L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1.npz",
    normalize="inception",
)
