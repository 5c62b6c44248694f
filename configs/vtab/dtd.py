_base_ = ["_vtab.py"]

model = dict(num_classes=47)
data = dict(task="dtd")
