_base_ = ["_table1_fgvc.py", "../_base_/methods/spt_adapter.py"]

# The paper's 0.41 % of 85,798,656 parameters, less the 180,407 that a head has on average.
method = dict(budget=171_367, alpha=10.0, beta=5.0)
