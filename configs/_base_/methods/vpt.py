# VPT-deep: prompts in every block.
method = dict(type="vpt", num_prompts=10)
