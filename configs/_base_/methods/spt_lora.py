# SPT-LoRA: scores, then low-rank modules on sensitive matrices and single weights elsewhere.
method = dict(type="spt", structured="lora", rank=8, alpha=1.0)
