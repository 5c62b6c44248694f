_base_ = ["_table2_mocov3.py", "../_base_/methods/spt_lora.py"]

# The paper's 0.50 % of 85,798,656 parameters, less the 38,045 that a head has on average.
method = dict(budget=390_948, alpha=10.0, beta=5.0)
