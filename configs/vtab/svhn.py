_base_ = ["_vtab.py"]

model = dict(num_classes=10)
data = dict(task="svhn")
