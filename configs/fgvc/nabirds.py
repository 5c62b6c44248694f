_base_ = ["_fgvc.py"]

model = dict(num_classes=555)
data = dict(data_set="nabirds")
