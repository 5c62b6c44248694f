# LoRA on the query and value projections of every block.
method = dict(type="lora", rank=8, targets=["q", "v"])
