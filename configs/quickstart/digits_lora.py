_base_ = [
    "../_base_/models/demo_vit.py",
    "../_base_/datasets/digits.py",
    "../_base_/schedules/adamw_cosine.py",
    "../_base_/engines/ddp.py",
    "../_base_/methods/lora.py",
]

# 4 * (96 + 96) parameters a matrix, two matrices in each of six blocks: 9,216 trainable parameters.
method = dict(rank=4)
