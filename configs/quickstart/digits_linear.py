_base_ = ["_digits.py", "../_base_/methods/linear.py"]
