_base_ = ["_vtab.py"]

model = dict(num_classes=397)
data = dict(task="sun397")
