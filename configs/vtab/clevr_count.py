_base_ = ["_vtab.py"]

model = dict(num_classes=8)
data = dict(task="clevr_count")
