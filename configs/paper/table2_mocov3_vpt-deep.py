_base_ = ["_table2_mocov3.py", "../_base_/methods/vpt.py"]

# VPT chose a number for each task; this is the one of table1_vtab_vpt-deep.py.
method = dict(num_prompts=102)
