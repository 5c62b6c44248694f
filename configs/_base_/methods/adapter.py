# Adapters: one behind the MLP of every block.
method = dict(type="adapter", rank=8, targets=["fc2"])
