"""BIAS: how many biases there are, by hand, and which tensors they are."""

import pytest
import torch
from torch import nn

from spt_dist.models.classifier import create_model
from spt_dist.tuning.methods import make_plan
from tests.models_for_tests import make_vit
from tests.tuning.methods.models_for_tests import Held
from tests.tuning.plans_for_tests import make_model

# Of each stage: blocks, width and, with windows of 7 x 7 tokens, heads.
SWIN_B = ((2, 128, 4), (2, 256, 8), (18, 512, 16), (2, 1024, 32))
CONVNEXT_B = ((3, 128), (3, 256), (27, 512), (3, 1024))
# norm1, query, key and value, proj, norm2, fc1, fc2; a table has a row for each of 13 x 13 distances.
OF_ATTENTION_AND_MLP = 1 + 3 + 1 + 1 + 4 + 1
SWIN_B_BLOCKS = sum(blocks * (OF_ATTENTION_AND_MLP * width + 13 * 13 * heads) for blocks, width, heads in SWIN_B)
# conv_dw, norm, fc1, fc2.
CONVNEXT_B_BLOCKS = sum(blocks * (1 + 1 + 4 + 1) * width for blocks, width in CONVNEXT_B)
COUNTS = {
    # As VPT's code counts them: blocks, patches and the final norm.
    "vit_base_patch16_224": 102_912,
    # The norm before each of three mergings has four times the width; patches have a norm.
    "swin_base_patch4_window7_224": SWIN_B_BLOCKS + 4 * (128 + 256 + 512) + 2 * 128 + 1024,
    # Norm and convolution of the stem and of three downsamplings.
    "convnext_base": CONVNEXT_B_BLOCKS + 2 * 128 + (128 + 256) + (256 + 512) + (512 + 1024) + 1024,
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name: str) -> None:
    plan = make_plan("bias", create_model(name, 100, {}, torch.device("meta")))
    assert plan.method == "bias"
    assert plan.num_trainable == plan.num_in_place == COUNTS[name]


def test_the_count_of_vit_b_is_that_of_its_blocks() -> None:
    assert COUNTS["vit_base_patch16_224"] == 12 * OF_ATTENTION_AND_MLP * 768 + 2 * 768


@pytest.mark.parametrize(
    ("model", "prefix", "head"),
    [(make_vit(), "", ["head.weight", "head.bias"]), (Held(), "backbone.", ["decode_head.weight", "decode_head.bias"])],
    ids=["alone", "held"],
)
def test_names(model: nn.Module, prefix: str, head: list[str]) -> None:
    plan = make_plan("bias", model)
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    in_blocks = [f"blocks.{block}.{layer}" for block in range(2) for layer in layers]
    assert plan.parameters == [f"{prefix}{layer}.bias" for layer in ("patch_embed.proj", *in_blocks, "norm")]
    assert plan.head == head


def test_relative_position_tables_are_biases() -> None:
    """So they are in VPT's code, which asks for "bias" in the name."""
    names = make_plan("bias", make_model("windows")).parameters
    tables = [name for name in names if not name.endswith(".bias")]
    blocks = ("layers.0.blocks.0", "layers.1.blocks.0", "layers.1.blocks.1")
    assert tables == [f"{block}.attn.relative_position_bias_table" for block in blocks]
