_base_ = ["_table1_fgvc.py", "../_base_/methods/lora.py"]

method = dict(rank=16)
