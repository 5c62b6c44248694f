_base_ = ["_fgvc.py"]

model = dict(num_classes=120)
data = dict(data_set="dogs")
