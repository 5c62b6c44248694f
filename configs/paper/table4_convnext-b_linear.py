_base_ = ["_table4_convnext-b.py", "../_base_/methods/linear.py"]
