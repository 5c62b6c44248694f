# ViT-S/16 of AugReg, pre-trained on ImageNet-21k. The file is below
# https://storage.googleapis.com/vit_models/augreg/
# The same in timm's names: model.safetensors of timm/vit_small_patch16_224.augreg_in21k on the Hugging Face hub.
model = dict(
    name="vit_small_patch16_224",
    kwargs=dict(drop_path_rate=0.1),
    checkpoint="checkpoints/S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0.npz",
    normalize="inception",
)
