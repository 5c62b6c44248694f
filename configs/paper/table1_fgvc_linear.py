_base_ = ["_table1_fgvc.py", "../_base_/methods/linear.py"]
