_base_ = ["_vtab.py"]

model = dict(num_classes=9)
data = dict(task="smallnorb_ele")
