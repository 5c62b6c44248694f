_base_ = ["_table2_mae.py", "../_base_/methods/spt_adapter.py"]

# The paper's 0.26 % of 85,798,656 parameters, less the 38,045 that a head has on average.
method = dict(budget=185_032, alpha=10.0, beta=5.0)
