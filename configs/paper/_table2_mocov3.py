# Table 2: ViT-B/16 of MoCo v3 on VTAB-1k.
_base_ = ["_vtab.py", "../_base_/models/vit-b16_mocov3.py"]
suite = dict(published="vtab_mocov3")
