# What the quickstart's methods share.
_base_ = [
    "../_base_/models/demo_vit.py",
    "../_base_/datasets/digits.py",
    "../_base_/schedules/adamw_cosine.py",
    "../_base_/engines/ddp.py",
]
# Thirty epochs instead of a hundred want a higher rate than the published 1e-3.
train = dict(epochs=30, lr=1e-2, eval_interval=5)
