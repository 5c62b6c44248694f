# Table 4: Swin-B on VTAB-1k.
_base_ = ["_vtab.py", "../_base_/models/swin-b_in22k.py"]
suite = dict(published="vtab_swin-b")
