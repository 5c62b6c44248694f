# Vision tower of OpenAI's CLIP ViT-L/14; the text tower in the file is left out.
# pytorch_model.bin of openai/clip-vit-large-patch14 on the Hugging Face hub; OpenAI's own .pt is a program instead.
# Its activation is the sigmoid approximation of GELU, which timm's names with "quickgelu" have and others have not.
model = dict(
    name="vit_large_patch14_clip_quickgelu_224",
    kwargs=dict(drop_path_rate=0.1),
    checkpoint="checkpoints/clip-vit-large-patch14/pytorch_model.bin",
    normalize="clip",
)
