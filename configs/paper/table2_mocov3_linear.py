_base_ = ["_table2_mocov3.py", "../_base_/methods/linear.py"]
