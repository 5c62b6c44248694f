"""A SETR of two small blocks on drawn scenes, for mmseg's own tools."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

# Must come before mmseg: it makes it importable beside mmcv-lite.
import spt_dist  # noqa: F401  # isort: skip

import mmseg
import torch
from mmengine.config import Config
from mmseg.registry import MODELS
from mmseg.utils import register_all_modules
from safetensors.torch import load_file, save_file
from torch import nn

from spt_dist.data.scenes import make_scenes
from spt_dist.models.vit_backbone import TimmVisionTransformer

TOOLS = Path(mmseg.__file__).parent / ".mim" / "tools"
BACKBONE: dict[str, Any] = {
    "img_size": (32, 32),
    "patch_size": 8,
    "embed_dims": 24,
    "num_layers": 2,
    "num_heads": 2,
    "out_indices": (0, 1),
    "interpolate_mode": "bilinear",
}
NUM_TRAIN, NUM_SCORED = 6, 5
BUDGET = 2000
HOOK = f"""dict(type="SPTHook", budget={BUDGET}, rank=2, unstructured=False, num_samples={NUM_SCORED}, batch_size=2)"""

_CONFIG = """\
default_scope = "mmseg"
custom_imports = dict(imports=["spt_dist.training.mmseg_hook"])
custom_hooks = [{hook}]
head = dict(type="SETRUPHead", in_channels=24, channels=8, num_classes=150, dropout_ratio=0, norm_cfg={norm},
            num_convs=2, kernel_size=3, align_corners=False)
loss = dict(type="CrossEntropyLoss", use_sigmoid=False)
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(type="SegDataPreProcessor", mean=[124.0, 116.0, 104.0], std=[58.0, 57.0, 57.0],
                           bgr_to_rgb=True, pad_val=0, seg_pad_val=255, size=(32, 32)),
    backbone=dict(
        type="TimmVisionTransformer", init_cfg=dict(type="Pretrained", checkpoint="{folder}/backbone.safetensors"),
        **{backbone}),
    decode_head=dict(in_index=1, loss_decode=dict(loss_weight=1.0, **loss), **head),
    auxiliary_head=[dict(in_index=0, loss_decode=dict(loss_weight=0.4, **loss), **head)],
    train_cfg=dict(),
    test_cfg=dict(mode="slide", crop_size=(32, 32), stride=(20, 20)))
reading = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", reduce_zero_label=True)]
augmentation = [
    dict(type="RandomResize", scale=(96, 48), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(32, 32), cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion")]
fixed = [dict(type="Resize", scale=(32, 32), keep_ratio=False)]
scenes = dict(type="ADE20KDataset", data_root="{folder}/ade")
train_dataloader = dict(
    batch_size={batch_size}, num_workers=0, sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
                 pipeline=reading + {transforms} + [dict(type="PackSegInputs")], **scenes))
val_dataloader = dict(
    batch_size=1, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
                 pipeline=reading + [dict(type="PackSegInputs")], **scenes))
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
optim_wrapper = dict(
    type="OptimWrapper", optimizer=dict(type="SGD", lr=0.01, momentum=0.9, weight_decay=0.0), clip_grad=None,
    paramwise_cfg=dict(custom_keys={{"head": dict(lr_mult=10.0)}}))
param_scheduler = [dict(type="PolyLR", eta_min=1e-4, power=0.9, begin=0, end=100, by_epoch=False)]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=4, val_interval=2)
val_cfg, test_cfg = dict(type="ValLoop"), dict(type="TestLoop")
default_hooks = dict(
    timer=dict(type="IterTimerHook"), logger=dict(type="LoggerHook", interval=1, log_metric_by_epoch=False),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=2, save_best="mIoU"),
    sampler_seed=dict(type="DistSamplerSeedHook"))
visualizer = dict(type="SegLocalVisualizer", vis_backends=[dict(type="LocalVisBackend")], name="visualizer")
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
# mmengine's default for several ranks is for GPUs.
model_wrapper_cfg = dict(type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False)
"""


def write_world(folder: Path) -> Path:
    """Scenes and a pre-trained backbone for ``write_config``; returns ``folder``."""
    make_scenes(folder / "ade", NUM_TRAIN, 2, 64, show_progress=False)
    torch.manual_seed(3)
    backbone = TimmVisionTransformer(**BACKBONE)
    for parameter in backbone.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    save_file(backbone.state_dict(), folder / "backbone.safetensors")
    return folder


def write_config(
    folder: Path, name: str, transforms: str = "augmentation", norm: str | None = "SyncBN", batch_size: int = 2
) -> Path:
    """Write a config whose run of four iterations takes a second, start-up not counted.

    Args:
        folder: from ``write_world``.
        name: of the file.
        transforms: of training images, "augmentation" or "fixed".
        norm: type of the heads' norm.
        batch_size: of a rank.
    """
    text = _CONFIG.format(
        hook=HOOK,
        folder=folder,
        backbone=BACKBONE,
        transforms=transforms,
        norm=None if norm is None else {"type": norm, "requires_grad": True},
        batch_size=batch_size,
    )
    path = folder / f"{name}.py"
    path.write_text(text)
    return path


def run_tool(name: str, *arguments: object) -> str:
    """Run one of mmseg's tools and return what it prints; it has to succeed."""
    command = [sys.executable, str(TOOLS / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def read_logged(work_dir: Path) -> dict[int, float]:
    """Iteration -> training loss, from mmengine's log."""
    (path,) = work_dir.glob("*/vis_data/scalars.json")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def build_plain(config: Path) -> nn.Module:
    """The config's model with the pre-trained backbone and random heads, in eval mode; without SyncBN."""
    register_all_modules()
    wanted = Config.fromfile(config).model
    for head in (wanted.decode_head, *wanted.auxiliary_head):
        head.norm_cfg = {"type": "BN"}
    model: nn.Module = MODELS.build(wanted).eval()
    model.backbone.load_state_dict(load_file(config.parent / "backbone.safetensors"))
    return model
