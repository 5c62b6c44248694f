_base_ = ["_table1_fgvc.py", "../_base_/methods/adapter.py"]
