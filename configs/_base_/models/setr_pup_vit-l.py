# SETR-PUP with ViT-L/16 as mmseg configures it for ADE20K; only the backbone's type is another one.
# The checkpoint: ViT-L/16 pre-trained on ImageNet-21k, under timm's names (safetensors or .pth) or mmseg's.
head = dict(
    type="SETRUPHead",
    in_channels=1024,
    channels=256,
    dropout_ratio=0,
    norm_cfg=dict(type="SyncBN", requires_grad=True),
    kernel_size=3,
    align_corners=False,
)
auxiliary = dict(num_convs=2, loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=0.4))
model = dict(
    name="mmseg.EncoderDecoder",
    num_classes=150,
    checkpoint="pretrained/vit_large_patch16.safetensors",
    kwargs=dict(
        backbone=dict(
            type="TimmVisionTransformer",
            img_size=(512, 512),
            patch_size=16,
            embed_dims=1024,
            num_layers=24,
            num_heads=16,
            out_indices=(9, 14, 19, 23),
            norm_cfg=dict(type="LN", eps=1e-6),
            interpolate_mode="bilinear",
        ),
        decode_head=dict(
            head,
            in_index=3,
            num_convs=4,
            up_scale=2,
            loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
        ),
        auxiliary_head=[dict(head, **auxiliary, in_index=index) for index in (0, 1, 2)],
        test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
    ),
)
del head, auxiliary
