# The ViT that ships with spt_dist; tools/make_demo_backbone.py makes it.
model = dict(
    name="vit_tiny_patch16_224",
    num_classes=10,
    kwargs=dict(img_size=32, patch_size=8, embed_dim=96, depth=6, num_heads=3, mlp_ratio=2.0),
    checkpoint="package://demo_vit.safetensors",
)
