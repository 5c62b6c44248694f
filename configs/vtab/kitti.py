_base_ = ["_vtab.py"]

model = dict(num_classes=4)
data = dict(task="kitti")
