_base_ = ["_table4_convnext-b.py", "../_base_/methods/spt_adapter.py"]

# The paper's 0.36 % of 87,566,464 parameters, less the 50,711 that a head has on average.
method = dict(budget=264_528, alpha=10.0, beta=5.0)
