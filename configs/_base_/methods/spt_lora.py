# SPT-LoRA: scores, then low-rank modules on sensitive matrices and single weights elsewhere.
sensitivity = dict(num_samples=800, batch_size=32, criterion="per_sample")
method = dict(type="spt", structured="lora", rank=8, alpha=1.0)
