# Vision tower of OpenCLIP's ViT-g/14, pre-trained on LAION-2B; the text tower in the file is left out.
# open_clip_pytorch_model.bin of laion/CLIP-ViT-g-14-laion2B-s12B-b42K on the Hugging Face hub.
model = dict(
    name="vit_giant_patch14_clip_224",
    kwargs=dict(drop_path_rate=0.1),
    checkpoint="checkpoints/CLIP-ViT-g-14-laion2B-s12B-b42K/open_clip_pytorch_model.bin",
    normalize="clip",
)
