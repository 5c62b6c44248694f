_base_ = ["all.py", "../_base_/methods/full.py"]

# Full fine-tuning keeps the published rate.
train = dict(lr=1e-3)
