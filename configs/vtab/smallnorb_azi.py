_base_ = ["_vtab.py"]

model = dict(num_classes=18)
data = dict(task="smallnorb_azi")
