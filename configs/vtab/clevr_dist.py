_base_ = ["_vtab.py"]

model = dict(num_classes=6)
data = dict(task="clevr_dist")
