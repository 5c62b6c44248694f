"""PARTIAL-k: which tensors the last blocks are, and how many weights, by hand."""

import pytest
import torch
from torch import nn

from spt_dist import UserError
from spt_dist.models.classifier import create_model
from spt_dist.tuning.methods import make_plan
from tests.models_for_tests import make_vit
from tests.tuning.methods.models_for_tests import Held
from tests.tuning.plans_for_tests import make_model


def block(width: int, table: int = 0) -> int:
    """Weights of a block: two norms, four projections, an MLP of four times the width, and a table of positions."""
    norms, attention = 2 * 2 * width, 4 * (width + 1) * width
    return norms + attention + (width + 1) * 4 * width + (4 * width + 1) * width + table


def convnext_block(width: int) -> int:
    """Weights of a block: kernels of 7 x 7, a norm, an MLP of four times the width, and its scale."""
    return (49 + 1) * width + 2 * width + (width + 1) * 4 * width + (4 * width + 1) * width + width


def swin_v2() -> nn.Module:
    """Two stages, of one block and of two."""
    kwargs = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 12, "depths": (1, 2), "num_heads": (2, 2)}
    return create_model("swinv2_tiny_window8_256", 10, kwargs, torch.device("meta"))


SWIN_TABLES = {512: 13 * 13 * 16, 1024: 13 * 13 * 32}
SWIN_LAST = 2 * block(1024, SWIN_TABLES[1024]) + 2 * 1024
COUNTS = [
    ("vit_base_patch16_224", {}, 1, 7_089_408),
    ("vit_base_patch16_224", {}, 4, 4 * 7_087_872 + 1_536),
    ("vit_base_patch16_224", {}, 12, 12 * block(768) + 2 * 768),
    ("vit_base_patch16_224.mae", {"global_pool": "avg"}, 1, 7_089_408),
    # VPT's partial-1, -2 and -4: the last block; the last stage; half of the one before and the merging between.
    ("swin_base_patch4_window7_224", {}, 1, block(1024, SWIN_TABLES[1024]) + 2 * 1024),
    ("swin_base_patch4_window7_224", {}, 2, SWIN_LAST),
    (
        "swin_base_patch4_window7_224",
        {},
        4,
        SWIN_LAST + 2 * block(512, SWIN_TABLES[512]) + 2 * (4 * 512) + (4 * 512) * 1024,
    ),
    ("convnext_base", {}, 3, 3 * convnext_block(1024) + 2 * 1024),
    (
        "convnext_base",
        {},
        4,
        3 * convnext_block(1024) + 2 * 1024 + convnext_block(512) + 2 * 512 + (4 * 512 + 1) * 1024,
    ),
]


@pytest.mark.parametrize(("name", "kwargs", "num_blocks", "count"), COUNTS)
def test_counts(name: str, kwargs: dict[str, object], num_blocks: int, count: int) -> None:
    model = create_model(name, 100, kwargs, torch.device("meta"))
    plan = make_plan("partial", model, num_blocks=num_blocks)
    assert plan.method == "partial"
    assert plan.num_trainable == plan.num_in_place == count


def test_a_block_of_vit_b_is_as_large_as_published() -> None:
    assert block(768) == 7_087_872


CASES = {
    "plain": (make_vit(), None, ("blocks.1.", "norm.")),
    "both blocks": (make_vit(), 2, ("blocks.0.", "blocks.1.", "norm.")),
    "a norm before the head": (make_vit(global_pool="avg"), 1, ("blocks.1.", "fc_norm.")),
    # As in CLIP, whose norm before the blocks is none of the last.
    "a norm before the blocks": (make_vit(pre_norm=True, depth=11), 2, ("blocks.9.", "blocks.10.", "norm.")),
    "held": (Held(), 1, ("backbone.blocks.1.", "backbone.norm.")),
    "Swin, 1": (make_model("windows"), 1, ("layers.1.blocks.1.", "norm.")),
    "Swin, 2": (make_model("windows"), 2, ("layers.1.blocks.", "norm.")),
    "Swin, 3": (make_model("windows"), 3, ("layers.0.blocks.0.", "layers.1.", "norm.")),
    # There are numbers within its blocks, too.
    "Swin V2, 1": (swin_v2(), 1, ("layers.1.blocks.1.", "norm.")),
    "Swin V2, 2": (swin_v2(), 2, ("layers.1.blocks.", "norm.")),
    "pooled by attention": (make_vit(global_pool="map"), 1, ("blocks.1.", "norm.", "attn_pool.")),
    "ConvNeXt, 1": (make_model("convolutions"), 1, ("stages.3.blocks.0.", "head.norm.")),
    "ConvNeXt, 2": (make_model("convolutions"), 2, ("stages.2.blocks.0.", "stages.3.", "head.norm.")),
}


@pytest.mark.parametrize(("model", "num_blocks", "prefixes"), CASES.values(), ids=CASES)
def test_names(model: nn.Module, num_blocks: int | None, prefixes: tuple[str, ...]) -> None:
    plan = make_plan("partial", model, **({} if num_blocks is None else {"num_blocks": num_blocks}))
    wanted = [name for name, _ in model.named_parameters() if name.startswith(prefixes)]
    assert plan.parameters == wanted
    assert all(any(name.startswith(prefix) for name in wanted) for prefix in prefixes)
    assert plan.options == {"num_blocks": num_blocks or 1}


@pytest.mark.parametrize(
    ("model", "num_blocks", "held"),
    [
        (make_vit(), 0, "2 blocks that this VisionTransformer has"),
        (make_vit(), 3, "2 blocks that this VisionTransformer has"),
        # Stages are no blocks.
        (make_model("windows"), 4, "3 blocks that this SwinTransformer has"),
    ],
    ids=["none", "too many", "of a Swin"],
)
def test_other_numbers_of_blocks_are_refused(model: nn.Module, num_blocks: int, held: str) -> None:
    with pytest.raises(UserError, match=rf"method\.num_blocks={num_blocks}: has to be at least 1.*{held}"):
        make_plan("partial", model, num_blocks=num_blocks)


@pytest.mark.parametrize("name", ["twins_svt_small", "mobilenetv3_small_100"])
def test_models_of_unknown_blocks_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"method\.type='partial': the blocks of this \w+ can't be told"):
        make_plan("partial", create_model(name, 10, {}, torch.device("meta")))
