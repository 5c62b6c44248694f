_base_ = ["_scenes.py", "../_base_/methods/linear.py"]
