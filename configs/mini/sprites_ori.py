_base_ = ["_mini.py"]

model = dict(num_classes=16)
data = dict(task="sprites_ori")
