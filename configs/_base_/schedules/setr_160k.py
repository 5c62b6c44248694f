# SGD as mmseg trains SETR on ADE20K: 160,000 steps of 16 images, the head ten times as fast.
train = dict(
    iterations=160_000,
    batch_size=16,
    optimizer="sgd",
    momentum=0.9,
    lr=1e-3,
    head_lr_mult=10.0,
    schedule="poly",
    poly_power=0.9,
    min_lr=1e-4,
    weight_decay=0.0,
    eval_interval=16_000,
    checkpoint_interval=16_000,
    checkpoint_steps=2_000,
    save_best=True,
)
