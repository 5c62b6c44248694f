# Full fine-tuning.
method = dict(type="full")
