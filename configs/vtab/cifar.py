_base_ = ["_vtab.py"]

model = dict(num_classes=100)
data = dict(task="cifar")
