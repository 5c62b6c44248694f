_base_ = ["_table4_swin-b.py", "../_base_/methods/lora.py"]
