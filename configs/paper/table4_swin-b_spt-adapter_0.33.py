_base_ = ["_table4_swin-b.py", "../_base_/methods/spt_adapter.py"]

# The paper's 0.33 % of 86,743,224 parameters, less the 50,711 that a head has on average.
method = dict(budget=235_542, alpha=10.0, beta=5.0)
