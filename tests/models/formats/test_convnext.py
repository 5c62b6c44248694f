"""ConvNeXt's own files against transformers' models and timm's converter."""

import spt_dist  # noqa: F401  # isort: skip

from pathlib import Path

import pytest
import timm
import torch
from timm.models.convnext import checkpoint_filter_fn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
)

from tests.models.formats.published import images, load, randomised, renamed

STAGE = r"convnext(?:v2)?\.encoder\.stages\.(\d+)\."
TO_OFFICIAL = {
    r"convnext(?:v2)?\.embeddings\.patch_embeddings": "downsample_layers.0.0",
    r"convnext(?:v2)?\.embeddings\.layernorm": "downsample_layers.0.1",
    r"convnext(?:v2)?\.layernorm": "norm",
    r"classifier": "head",
    STAGE + r"downsampling_layer": r"downsample_layers.\1",
    STAGE + r"layers\.(\d+)\.layernorm": r"stages.\1.\2.norm",
    STAGE + r"layers\.(\d+)\.layer_scale_parameter": r"stages.\1.\2.gamma",
    STAGE + r"layers\.(\d+)\.grn\.weight": r"stages.\1.\2.grn.gamma",
    STAGE + r"layers\.(\d+)\.grn\.bias": r"stages.\1.\2.grn.beta",
    STAGE + r"layers\.(\d+)": r"stages.\1.\2",
}
SIZES = {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 2, 1, 1], "num_labels": 10}


@pytest.mark.parametrize("version", [1, 2])
def test_convnext(tmp_path: Path, version: int) -> None:
    if version == 1:
        theirs = randomised(ConvNextForImageClassification(ConvNextConfig(**SIZES)))
    else:
        theirs = randomised(ConvNextV2ForImageClassification(ConvNextV2Config(**SIZES)))
    state = renamed(theirs.state_dict(), TO_OFFICIAL)
    torch.save({"model": state}, tmp_path / "convnext_base_22k_224.pth")
    name = "convnext_base" if version == 1 else "convnextv2_base"
    model = timm.create_model(name, depths=(1, 2, 1, 1), dims=(8, 12, 16, 20), num_classes=10)
    model, translation = load(model, tmp_path / "convnext_base_22k_224.pth")
    # Their last norm's epsilon is 1e-12, the paper's 1e-6.
    model.head.norm.eps = theirs.base_model.layernorm.eps
    torch.testing.assert_close(model(images(64)), theirs(images(64)).logits, rtol=1e-9, atol=1e-9)
    assert (translation.format, translation.unused) == ("ConvNeXt", {})
    converted = checkpoint_filter_fn({"model": state}, model)
    assert converted.keys() == translation.sources.keys()
    assert all(torch.equal(value, converted[own_name]) for own_name, value in model.state_dict().items())
