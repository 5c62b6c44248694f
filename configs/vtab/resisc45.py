_base_ = ["_vtab.py"]

model = dict(num_classes=45)
data = dict(task="resisc45")
