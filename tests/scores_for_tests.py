"""What scores say about themselves, for scores that tests make up."""

from dataclasses import replace
from typing import Any

from spt_dist.sensitivity.scores import ScoreInfo

_INFO = ScoreInfo(
    criterion="per_sample",
    loss_reduction="sum",
    num_samples=3,
    train_mode=False,
    head=["head.weight"],
    always_tuned={},
    skipped={},
    matrices=[],
    backbone_size=0,
)


def make_info(**changes: Any) -> ScoreInfo:
    """Per-sample scores of three samples, with some fields changed."""
    return replace(_INFO, **changes)
