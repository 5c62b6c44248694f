"""The backbones' configs against timm's own entries for the same weights, and what docs/backbones.md says of them."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models import get_pretrained_cfg
from torch import nn

from spt_dist.config import read_values
from spt_dist.models.classifier import create_model
from spt_dist.models.matrices import take_inventory
from spt_dist.normalisation import read_normalisation
from spt_dist.sections import ModelConfig
from tests.launch.processes import ROOT

MODELS = ROOT / "configs" / "_base_" / "models"
# Config -> timm's entry for the same weights; MoCo v3 has none there, but its backbone is MAE's.
ENTRIES = {
    "vit-s16_augreg-in21k": "vit_small_patch16_224.augreg_in21k",
    "vit-b16_in21k": "vit_base_patch16_224.orig_in21k",
    "vit-b16_augreg-in21k": "vit_base_patch16_224.augreg_in21k",
    "vit-l16_in21k": "vit_large_patch16_224.orig_in21k",
    "vit-l16_augreg-in21k": "vit_large_patch16_224.augreg_in21k",
    "vit-h14_in21k": "vit_huge_patch14_224.orig_in21k",
    "vit-b16_mae": "vit_base_patch16_224.mae",
    "vit-b16_mocov3": "",
    "deit-b16": "deit_base_patch16_224.fb_in1k",
    "dinov2_vit-s14": "vit_small_patch14_dinov2.lvd142m",
    "dinov2_vit-b14": "vit_base_patch14_dinov2.lvd142m",
    "dinov2_vit-l14": "vit_large_patch14_dinov2.lvd142m",
    "dinov2_vit-g14": "vit_giant_patch14_dinov2.lvd142m",
    "dinov2_vit-s14_reg": "vit_small_patch14_reg4_dinov2.lvd142m",
    "dinov2_vit-b14_reg": "vit_base_patch14_reg4_dinov2.lvd142m",
    "dinov2_vit-l14_reg": "vit_large_patch14_reg4_dinov2.lvd142m",
    "dinov2_vit-g14_reg": "vit_giant_patch14_reg4_dinov2.lvd142m",
    "dinov3_vit-s16": "vit_small_patch16_dinov3.lvd1689m",
    "dinov3_vit-b16": "vit_base_patch16_dinov3.lvd1689m",
    "dinov3_vit-l16": "vit_large_patch16_dinov3.lvd1689m",
    "dinov3_vit-h16plus": "vit_huge_plus_patch16_dinov3.lvd1689m",
    "clip_vit-b16_laion2b": "vit_base_patch16_clip_224.laion2b",
    "clip_vit-l14_laion2b": "vit_large_patch14_clip_224.laion2b",
    "clip_vit-g14_laion2b": "vit_giant_patch14_clip_224.laion2b",
    "clip_vit-b16_openai": "vit_base_patch16_clip_quickgelu_224.openai",
    "clip_vit-l14_openai": "vit_large_patch14_clip_quickgelu_224.openai",
    "swin-b_in22k": "swin_base_patch4_window7_224.ms_in22k",
    "swin-l_in22k": "swin_large_patch4_window7_224.ms_in22k",
    "convnext-b_in22k": "convnext_base.fb_in22k",
    "convnext-l_in22k": "convnext_large.fb_in22k",
}
# No backbones of classifiers that are published by others.
OTHERS = {"demo_vit", "setr_pup_demo_vit", "setr_pup_vit-l"}
# Patch, width, depth, width of the MLP.
PLAIN = {
    "s16": (16, 384, 12, 1536),
    "s14": (14, 384, 12, 1536),
    "b16": (16, 768, 12, 3072),
    "b14": (14, 768, 12, 3072),
    "l16": (16, 1024, 24, 4096),
    "l14": (14, 1024, 24, 4096),
    "h14": (14, 1280, 32, 5120),
}


def read_model(name: str, num_classes: int = 10) -> ModelConfig:
    values: dict[str, Any] = read_values(MODELS / f"{name}.py")["model"]
    return ModelConfig(num_classes=num_classes, **values)


def on_meta(name: str) -> nn.Module:
    config = read_model(name)
    return create_model(config.name, config.num_classes, config.kwargs, torch.device("meta"))


def test_every_backbone_is_tested() -> None:
    assert {path.stem for path in MODELS.glob("*.py")} - OTHERS == set(ENTRIES)


@pytest.mark.parametrize("name", ENTRIES)
def test_it_is_what_timm_says_of_the_same_weights(name: str) -> None:
    config, entry = read_model(name), get_pretrained_cfg(ENTRIES[name] or ENTRIES["vit-b16_mae"])
    assert entry is not None
    assert config.name == (ENTRIES[name] or ENTRIES["vit-b16_mae"]).split(".")[0]
    assert config.normalize is not None
    normalisation = read_normalisation("model.normalize", config.normalize)
    assert (normalisation.mean, normalisation.std) == (tuple(entry.mean), tuple(entry.std))
    # DINOv2's files are for 518, and timm has 256 for DINOv3's; everything else sees what it was trained with.
    kind = name.partition("_")[0]
    size = {"dinov2": 518, "dinov3": 256}.get(kind, 224)
    assert entry.input_size == (3, size, size)
    own = {"dinov2": {"img_size": 224}, "dinov3": {"img_size": 224, "global_pool": "token"}}.get(kind, {})
    assert config.kwargs == {"drop_path_rate": 0.1, **own}
    assert config.checkpoint is not None
    assert config.checkpoint.startswith("checkpoints/")
    if ENTRIES[name] and entry.url:
        assert Path(config.checkpoint).name == Path(entry.url).name


@pytest.mark.parametrize("name", ENTRIES)
def test_head_and_pooling_are_the_paper_s(name: str) -> None:
    """A class token behind the pre-trained norm, for supervised ViTs, MAE and MoCo v3; else places' mean."""
    model = on_meta(name)
    inventory = take_inventory(model)
    heads = {"head.weight", "head.bias"} if "vit" in name or "deit" in name else {"head.fc.weight", "head.fc.bias"}
    assert set(inventory.head) == heads
    assert model.get_parameter(sorted(heads)[1]).shape[0] == 10
    if "vit" in name or "deit" in name:
        assert model.global_pool == "token"
        assert isinstance(model.norm, nn.LayerNorm)
        assert isinstance(model.fc_norm, nn.Identity)
        if name.startswith("dinov3"):
            assert model.pos_embed is None and model.reg_token.shape[1] == 4
        else:
            assert model.pos_embed.shape[1] == (model.patch_embed.num_patches + ("_reg" not in name))
        assert model.patch_embed.grid_size == ((16, 16) if "14" in name else (14, 14))
        assert model.blocks[-1].drop_path2.drop_prob == pytest.approx(0.1)
    else:
        assert model.get_submodule("head.global_pool").pool_type == "avg"
        assert isinstance(model.norm if "swin" in name else model.head.norm, nn.LayerNorm)


def plain_size(name: str) -> int:
    """Weights of a plain ViT, by hand."""
    patch, width, depth, hidden = PLAIN[name.removesuffix("_reg").partition("-")[2].split("_")[0]]
    is_clip, is_dino = name.startswith("clip"), name.startswith("dino")
    registers = 4 if name.endswith("_reg") or name.startswith("dinov3") else 0
    # With registers the class token has no place of its own; CLIP has no bias there, but a norm in front.
    places = 0 if name.startswith("dinov3") else (224 // patch) ** 2 + (registers == 0)
    stem = 3 * patch**2 * width + width * (2 if is_clip else 1) + (1 + registers + places) * width
    block = 4 * width**2 + 4 * width + 2 * width * hidden + hidden + width + 4 * width
    # DINOv3 has no biases of query, key and value.
    block -= 3 * width * name.startswith("dinov3")
    # Layer scales.
    return stem + depth * (block + 2 * width * is_dino) + 2 * width


@pytest.mark.parametrize("name", [name for name in ENTRIES if re.search(r"vit-[sblh]\d\d(?!plus)|deit", name)])
def test_weights_of_plain_vits_by_hand(name: str) -> None:
    assert take_inventory(on_meta(name)).backbone_size == plain_size(name)


@pytest.mark.parametrize(
    ("name", "classes", "millions"),
    [
        # Microsoft's and Meta's tables, with a head of 1,000 classes.
        ("swin-b_in22k", 1000, 88),
        ("swin-l_in22k", 1000, 197),
        ("convnext-b_in22k", 1000, 89),
        ("convnext-l_in22k", 1000, 198),
        # Backbones alone.
        ("dinov2_vit-s14", 0, 22),
        ("dinov2_vit-g14", 0, 1135),
        ("dinov2_vit-g14_reg", 0, 1135),
    ],
)
def test_weights_as_published(name: str, classes: int, millions: int) -> None:
    model = on_meta(name)
    width = int(model.num_features)  # type: ignore[arg-type]  # timm's models have it
    assert round((take_inventory(model).backbone_size + classes * (width + 1)) / 1e6) == millions


def test_the_giants_by_hand() -> None:
    width, hidden, depth = 1408, 6144, 40
    block = 4 * width**2 + 4 * width + 2 * width * hidden + hidden + width + 4 * width
    stem = 3 * 14**2 * width + 2 * width + (1 + 257) * width
    assert take_inventory(on_meta("clip_vit-g14_laion2b")).backbone_size == stem + depth * block + 2 * width
    # SwiGLU: two thirds of four times the width, a multiple of eight, is 4,096; the first layer makes both halves.
    width, hidden = 1536, 4096
    block = 4 * width**2 + 4 * width + 3 * width * hidden + 2 * hidden + width + 4 * width + 2 * width
    stem = 3 * 14**2 * width + width + (1 + 257) * width
    assert take_inventory(on_meta("dinov2_vit-g14")).backbone_size == stem + depth * block + 2 * width
    # Two thirds of six times the width; gate and values each have a layer.
    width, hidden, depth = 1280, 5120, 32
    block = 4 * width**2 + width + 3 * width * hidden + 2 * hidden + width + 4 * width + 2 * width
    stem = 3 * 16**2 * width + width + (1 + 4) * width
    assert take_inventory(on_meta("dinov3_vit-h16plus")).backbone_size == stem + depth * block + 2 * width


def test_a_checksum_is_the_one_in_the_file_s_name() -> None:
    """Nothing else has one: none is made up."""
    found = {name: read_model(name) for name in ENTRIES if read_model(name).sha256 is not None}
    assert set(found) == {"deit-b16", *(name for name in ENTRIES if name.startswith("dinov3"))}
    for config in found.values():
        assert Path(str(config.checkpoint)).stem.endswith(f"-{config.sha256}")


def test_openai_s_clip_has_its_own_activation() -> None:
    """With timm's other name for the same shapes it would load, and compute something else."""
    assert type(on_meta("clip_vit-b16_openai").blocks[0].mlp.act) is not type(  # type: ignore[union-attr, index]
        on_meta("clip_vit-b16_laion2b").blocks[0].mlp.act  # type: ignore[union-attr, index]
    )


def documented() -> dict[str, list[str]]:
    """Rows of the table of docs/backbones.md: config -> its cells."""
    lines = (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {row[0].strip("`"): row for row in rows if row[0].strip("`") in ENTRIES}


def test_the_documentation_has_them_all() -> None:
    rows = documented()
    assert set(rows) == set(ENTRIES)
    for name, row in rows.items():
        config = read_model(name)
        assert f"{take_inventory(on_meta(name)).backbone_size:,}" == row[2], name
        assert config.normalize == row[3], name
