_base_ = ["_mini.py"]

model = dict(num_classes=10)
data = dict(task="digits")
