# A small SETR-PUP on the ViT that ships with spt_dist, for a CPU. Its convolutions don't look around, so that what a
# texture is has to come from the backbone.
head = dict(
    type="SETRUPHead",
    in_channels=96,
    channels=32,
    dropout_ratio=0,
    norm_cfg=dict(type="SyncBN", requires_grad=True),
    kernel_size=1,
    align_corners=False,
)
auxiliary = dict(num_convs=1, loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=0.4))
model = dict(
    name="mmseg.EncoderDecoder",
    num_classes=150,
    checkpoint="package://demo_vit.safetensors",
    kwargs=dict(
        backbone=dict(
            type="TimmVisionTransformer",
            img_size=(64, 64),
            patch_size=8,
            embed_dims=96,
            num_layers=6,
            num_heads=3,
            mlp_ratio=2,
            out_indices=(2, 3, 4, 5),
            norm_cfg=dict(type="LN", eps=1e-6),
            interpolate_mode="bilinear",
        ),
        decode_head=dict(
            head,
            in_index=3,
            num_convs=3,
            up_scale=2,
            loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
        ),
        auxiliary_head=[dict(head, **auxiliary, in_index=1)],
        test_cfg=dict(mode="slide", crop_size=(64, 64), stride=(43, 43)),
    ),
)
del head, auxiliary
