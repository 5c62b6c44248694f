_base_ = ["_table1_vtab.py", "../_base_/methods/adapter.py"]
