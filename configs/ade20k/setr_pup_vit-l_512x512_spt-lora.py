_base_ = ["_setr_pup_vit-l_512x512.py", "../_base_/methods/spt_lora.py"]

# Modules only, as the paper tunes SETR; with the head 14.6 M are trained.
method = dict(unstructured=False, alpha=10.0, budget=1_480_000)
