_base_ = ["_mini.py"]

model = dict(num_classes=12)
data = dict(task="photos")
