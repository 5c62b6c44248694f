# Table 1: ViT-B/16 pre-trained on ImageNet-21k, which is the tasks' own backbone.
_base_ = ["_vtab.py"]
suite = dict(published="vtab")
