_base_ = ["_scenes.py", "../_base_/methods/spt_lora.py"]

# Modules only, as the paper tunes SETR; as many trainable parameters as scenes_lora.py has.
method = dict(unstructured=False, alpha=10.0, budget=46_080)
