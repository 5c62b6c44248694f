_base_ = ["all.py", "../_base_/methods/linear.py"]
