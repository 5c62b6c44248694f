# Vision tower of OpenCLIP's ViT-B/16, pre-trained on LAION-2B; the text tower in the file is left out.
# open_clip_pytorch_model.bin of laion/CLIP-ViT-B-16-laion2B-s34B-b88K on the Hugging Face hub.
model = dict(
    name="vit_base_patch16_clip_224",
    kwargs=dict(drop_path_rate=0.1),
    checkpoint="checkpoints/CLIP-ViT-B-16-laion2B-s34B-b88K/open_clip_pytorch_model.bin",
    normalize="clip",
)
