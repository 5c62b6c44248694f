_base_ = ["_fgvc.py"]

model = dict(num_classes=102)
data = dict(data_set="flowers")
