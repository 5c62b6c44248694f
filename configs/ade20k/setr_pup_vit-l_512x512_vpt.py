_base_ = ["_setr_pup_vit-l_512x512.py", "../_base_/methods/vpt.py"]
