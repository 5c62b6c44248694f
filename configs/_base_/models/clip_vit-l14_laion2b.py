# Vision tower of OpenCLIP's ViT-L/14, pre-trained on LAION-2B; the text tower in the file is left out.
# open_clip_pytorch_model.bin of laion/CLIP-ViT-L-14-laion2B-s32B-b82K on the Hugging Face hub.
# Unlike other CLIP models it was trained on images normalised with 0.5 and 0.5.
model = dict(
    name="vit_large_patch14_clip_224",
    kwargs=dict(drop_path_rate=0.1),
    checkpoint="checkpoints/CLIP-ViT-L-14-laion2B-s32B-b82K/open_clip_pytorch_model.bin",
    normalize="inception",
)
