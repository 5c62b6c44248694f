"""A small SETR-PUP with auxiliary heads and synchronised batch norm."""

import copy
from typing import Any

from torch import nn

from spt_dist.models.classifier import SEGMENTOR, build_classifier

NUM_CLASSES = 5
_HEAD: dict[str, Any] = {
    "type": "SETRUPHead",
    "in_channels": 24,
    "channels": 8,
    "dropout_ratio": 0,
    "norm_cfg": {"type": "SyncBN", "requires_grad": True},
    "num_convs": 1,
    "up_scale": 2,
    "align_corners": False,
}
SETTINGS: dict[str, Any] = {
    "backbone": {
        "type": "TimmVisionTransformer",
        "img_size": (32, 32),
        "patch_size": 8,
        "embed_dims": 24,
        "num_layers": 3,
        "num_heads": 2,
        "mlp_ratio": 2,
        "out_indices": (0, 2),
    },
    "decode_head": {**_HEAD, "in_index": 1, "loss_decode": {"type": "CrossEntropyLoss", "loss_weight": 1.0}},
    "auxiliary_head": [{**_HEAD, "in_index": 0, "loss_decode": {"type": "CrossEntropyLoss", "loss_weight": 0.4}}],
    "test_cfg": {"mode": "slide", "crop_size": (32, 32), "stride": (21, 21)},
}


def make_segmentor(num_classes: int = NUM_CLASSES, seed: int = 0, **changes: Any) -> nn.Module:
    """The model with random weights; ``changes`` replace settings."""
    return build_classifier(SEGMENTOR, num_classes, copy.deepcopy(SETTINGS) | changes, seed=seed)
