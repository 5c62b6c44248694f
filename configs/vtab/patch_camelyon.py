_base_ = ["_vtab.py"]

model = dict(num_classes=2)
data = dict(task="patch_camelyon")
