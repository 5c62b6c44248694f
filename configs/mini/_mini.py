# SPT-LoRA on the backbone that ships with spt_dist: what the mini-benchmark's tasks share.
_base_ = [
    "../_base_/models/demo_vit.py",
    "../_base_/datasets/mini.py",
    "../_base_/schedules/adamw_cosine.py",
    "../_base_/methods/spt_lora.py",
    "../_base_/engines/ddp.py",
]
# As many trainable parameters as LoRA of rank 4 on queries and values has; alpha and beta as in the published code.
method = dict(budget=9216, rank=4, alpha=10.0, beta=5.0)
# Thirty epochs instead of a hundred want a higher rate than the published 1e-3.
train = dict(epochs=30, lr=1e-2, eval_interval=10)
