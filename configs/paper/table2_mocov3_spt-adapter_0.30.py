_base_ = ["_table2_mocov3.py", "../_base_/methods/spt_adapter.py"]

# The paper's 0.30 % of 85,798,656 parameters, less the 38,045 that a head has on average.
method = dict(budget=219_351, alpha=10.0, beta=5.0)
