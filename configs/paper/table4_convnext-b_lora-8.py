_base_ = ["_table4_convnext-b.py", "../_base_/methods/lora.py"]

# There are no queries and values; what the paper puts LoRA on instead is not known.
method = dict(targets=["fc1", "fc2"])
