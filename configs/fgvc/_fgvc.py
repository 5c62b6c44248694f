# SPT-LoRA on FGVC: what the data sets share. SPT's scripts for FGVC are not published; its paper names this schedule.
_base_ = [
    "../_base_/models/vit-b16_in21k.py",
    "../_base_/datasets/fgvc.py",
    "../_base_/schedules/adamw_cosine.py",
    "../_base_/methods/spt_lora.py",
    "../_base_/engines/ddp.py",
]
# The paper's tables have 0.41 and 0.60 % of the backbone's parameters; alpha and beta are those of the code.
method = dict(budget=400_000, rank=8, alpha=10.0, beta=5.0)
train = dict(epochs=100, warmup_epochs=10, eval_interval=10)
# As SPT's and VPT's code feeds this backbone, which was trained with 0.5 and 0.5. Another one in its place has its own.
model = dict(normalize="imagenet")
