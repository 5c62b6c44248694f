_base_ = ["_table1_vtab.py", "../_base_/methods/bias.py"]

# VPT chose a rate for each task, of 2.5e-5, 1.25e-4, 2.5e-4 and 1.25e-3 for batches of 64, with five epochs of warm-up.
# The last of them is the nearest to the 1e-3 of the other rows that train few weights.
train = dict(lr=1.25e-3, warmup_epochs=5)
