_base_ = ["_table2_mae.py", "../_base_/methods/adapter.py"]
