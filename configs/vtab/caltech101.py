_base_ = ["_vtab.py"]

model = dict(num_classes=102)
data = dict(task="caltech101")
