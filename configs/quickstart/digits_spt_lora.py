_base_ = [
    "../_base_/models/demo_vit.py",
    "../_base_/datasets/digits.py",
    "../_base_/schedules/adamw_cosine.py",
    "../_base_/engines/ddp.py",
    "../_base_/methods/spt_lora.py",
]

# As many trainable parameters as digits_lora.py has.
method = dict(budget=9216, rank=4)
