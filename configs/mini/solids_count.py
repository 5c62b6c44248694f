_base_ = ["_mini.py"]

model = dict(num_classes=8)
data = dict(task="solids_count")
