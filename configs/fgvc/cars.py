_base_ = ["_fgvc.py"]

model = dict(num_classes=196)
data = dict(data_set="cars")
