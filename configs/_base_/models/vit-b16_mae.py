# ViT-B/16 of MAE, pre-trained on ImageNet-1k without labels.
# https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_base.pth
# As SPT uses it: class token and the pre-trained norm. VPT takes the mean of the other tokens and a fresh norm in place
# of that one, which is kwargs=dict(global_pool="avg", fc_norm=True).
model = dict(
    name="vit_base_patch16_224",
    kwargs=dict(drop_path_rate=0.1),
    checkpoint="checkpoints/mae_pretrain_vit_base.pth",
    normalize="imagenet",
)
