# Table 4: ConvNeXt-B on VTAB-1k.
_base_ = ["_vtab.py", "../_base_/models/convnext-b_in22k.py"]
suite = dict(published="vtab_convnext-b")
