_base_ = ["_scenes.py", "../_base_/methods/spt_lora.py"]

# As many trainable parameters as scenes_lora.py has.
method = dict(unstructured=False, alpha=10.0, budget=18_432)
