_base_ = ["_table4_convnext-b.py", "../_base_/methods/full.py"]

# VPT chose a rate for each task, of 2.5e-5, 1.25e-4, 2.5e-4 and 1.25e-3 for batches of 64, with five epochs of warm-up.
train = dict(lr=1.25e-4, warmup_epochs=5)
