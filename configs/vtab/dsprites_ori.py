_base_ = ["_vtab.py"]

model = dict(num_classes=16)
data = dict(task="dsprites_ori")
