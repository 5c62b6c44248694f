# What the methods share.
_base_ = [
    "../_base_/models/setr_pup_vit-l.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/setr_160k.py",
    "../_base_/engines/ddp.py",
]
sensitivity = dict(num_samples=800, batch_size=1)
