# Table 2: ViT-B/16 of MAE on VTAB-1k.
_base_ = ["_vtab.py", "../_base_/models/vit-b16_mae.py"]
suite = dict(published="vtab_mae")
