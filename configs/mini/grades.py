_base_ = ["_mini.py"]

model = dict(num_classes=5)
data = dict(task="grades")
