# SETR in miniature: the demo backbone on drawn scenes in ADE20K's layout, which `make segmentation` puts into data/.
_base_ = [
    "../_base_/models/setr_pup_demo_vit.py",
    "../_base_/schedules/adamw_cosine.py",
    "../_base_/engines/ddp.py",
]
data = dict(type="ade20k", root="data/scenes", crop_size=(64, 64), scale=(192, 96), num_workers=0)
sensitivity = dict(num_samples=200, batch_size=8)
# SGD would need many more steps to move so small a budget. Intervals are in steps.
train = dict(
    epochs=None,
    iterations=400,
    batch_size=16,
    lr=1e-2,
    warmup_epochs=20,
    eval_interval=200,
    checkpoint_interval=200,
)
