# SPT with deep prompts: scores, then prompts in sensitive blocks and single weights elsewhere.
method = dict(type="spt", structured="prompt", rank=8, alpha=1.0)
