# SPT-LoRA as SPT's scripts train it (configs/vtab_supervised_spt_lora.sh, train_spt.py): what the tasks share.
_base_ = [
    "../_base_/models/vit-b16_in21k.py",
    "../_base_/datasets/vtab.py",
    "../_base_/schedules/adamw_cosine.py",
    "../_base_/methods/spt_lora.py",
    "../_base_/engines/ddp.py",
]
# The scripts try 0.2, 0.4, 0.6, 0.8 and 1.0 M trainable parameters for each task. alpha and beta are the code's.
method = dict(budget=400_000, rank=8, alpha=10.0, beta=5.0)
# The other values of the schedule are the published ones already. The scripts report the best of these evaluations,
# on test images; here the last one counts.
train = dict(epochs=100, warmup_epochs=10, eval_interval=10)
# SPT's code feeds it ImageNet's mean and deviation, while it was trained with 0.5 and 0.5. A suite with another
# backbone (_base_ = ["all.py", "../_base_/models/NAME.py"]) has that one's own.
model = dict(normalize="imagenet")
