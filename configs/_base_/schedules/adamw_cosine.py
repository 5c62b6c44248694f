# AdamW with a cosine schedule, as published for SPT but for the number of epochs.
train = dict(
    epochs=30,
    batch_size=64,
    lr=1e-3,
    min_lr=1e-5,
    warmup_epochs=3,
    warmup_lr=1e-6,
    weight_decay=1e-4,
    eval_interval=10,
    checkpoint_interval=5,
)
