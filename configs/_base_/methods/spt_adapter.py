# SPT-Adapter: scores, then bottleneck adapters behind sensitive matrices and single weights elsewhere.
method = dict(type="spt", structured="adapter", rank=8, alpha=1.0)
