_base_ = ["_digits.py", "../_base_/methods/spt_prompt.py"]

# As many trainable parameters as digits_lora.py has; alpha and beta as in the published code.
method = dict(budget=9216, rank=8, alpha=10.0, beta=5.0)
