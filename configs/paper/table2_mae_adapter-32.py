_base_ = ["_table2_mae.py", "../_base_/methods/adapter.py"]

method = dict(rank=32)
