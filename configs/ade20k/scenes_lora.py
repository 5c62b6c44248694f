_base_ = ["_scenes.py", "../_base_/methods/lora.py"]

method = dict(rank=10, targets=["q", "k", "v", "proj"])
