_base_ = ["_table1_vtab.py", "../_base_/methods/spt_lora.py"]

# The paper's 0.63 % of 85,798,656 parameters, less the 38,045 that a head has on average.
method = dict(budget=502_487, alpha=10.0, beta=5.0)
