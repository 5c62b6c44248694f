_base_ = ["_vtab.py"]

model = dict(num_classes=37)
data = dict(task="oxford_iiit_pet")
