_base_ = ["all.py", "../_base_/methods/lora.py"]

# 4 * (96 + 96) parameters a matrix, two matrices in each of six blocks: 9,216 trainable parameters.
method = dict(rank=4)
