_base_ = ["_table1_vtab.py", "../_base_/methods/partial.py"]

# VPT chose a rate for each task, of 2.5e-5, 1.25e-4, 2.5e-4 and 1.25e-3 for batches of 64, with five epochs of warm-up.
# This is the one of table1_vtab_full.py.
train = dict(lr=1.25e-4, warmup_epochs=5)
