_base_ = ["_scenes.py", "../_base_/methods/full.py"]
