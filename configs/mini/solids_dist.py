_base_ = ["_mini.py"]

model = dict(num_classes=6)
data = dict(task="solids_dist")
