_base_ = ["_table1_fgvc.py", "../_base_/methods/spt_lora.py"]

# The paper's 0.60 % of 85,798,656 parameters, less the 180,407 that a head has on average.
method = dict(budget=334_385, alpha=10.0, beta=5.0)
