_base_ = ["_fgvc.py"]

model = dict(num_classes=200)
data = dict(data_set="cub")
