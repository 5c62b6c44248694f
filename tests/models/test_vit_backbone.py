"""timm's ViT as a backbone of mmseg, against mmseg's own ViT with the same weights."""

# Must come before timm and mmseg: it makes them importable beside CPU builds.
import spt_dist  # noqa: F401  # isort: skip

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

mmseg = pytest.importorskip("mmseg")
pytestmark = pytest.mark.segmentation

from mmengine.config import Config  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402
from mmseg.models.backbones import VisionTransformer  # noqa: E402
from mmseg.registry import MODELS  # noqa: E402

from spt_dist import UserError, estimate_sensitivity  # noqa: E402
from spt_dist.models.matrices import take_inventory  # noqa: E402
from spt_dist.models.mmseg_names import to_mmseg, to_timm  # noqa: E402
from spt_dist.models.vit_backbone import TimmVisionTransformer  # noqa: E402
from tests.models_for_tests import pick  # noqa: E402
from tests.sensitivity.oracle import one_by_one, relative_error  # noqa: E402

CONFIGS = Path(mmseg.__file__).parent / ".mim" / "configs"
SETR = sorted((CONFIGS / "setr").glob("*.py")) + sorted((CONFIGS / "_base_" / "models").glob("setr_*.py"))
SMALL: dict[str, Any] = {"img_size": (32, 48), "patch_size": 8, "embed_dims": 12, "num_layers": 3, "num_heads": 2}
# The grid of the weights, a larger and a smaller one, as many patches on a side but another shape, and broken patches.
SIZES = [(32, 48), (64, 56), (16, 24), (32, 32), (37, 50), (5, 100)]


def disturb(model: nn.Module, seed: int = 0) -> None:
    """Move every parameter away from where it was initialised."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)


def make_pair(**settings: Any) -> tuple[TimmVisionTransformer, nn.Module]:
    """Our backbone and mmseg's with the same weights."""
    settings = SMALL | settings
    ours = TimmVisionTransformer(**settings)
    theirs = VisionTransformer(**({"patch_bias": True} | settings))
    disturb(ours)
    theirs.load_state_dict(to_mmseg(ours.state_dict()), strict=True)
    for model in (ours, theirs):
        model.eval()
    return ours, theirs


def largest_difference(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> float:
    """Over all maps, which have to have the same shapes."""
    assert [found.shape for found in ours] == [wanted.shape for wanted in theirs]
    return max(float((found - wanted).detach().abs().max()) for found, wanted in zip(ours, theirs, strict=True))


VARIANTS: list[dict[str, Any]] = [
    {},
    {"out_indices": (0, 2)},
    {"out_indices": [1], "with_cls_token": False, "interpolate_mode": "bilinear"},
    {"out_indices": (0, 1, 2), "final_norm": True, "norm_cfg": {"type": "LN", "eps": 1e-2, "requires_grad": True}},
    {"patch_bias": False, "mlp_ratio": 2, "in_channels": 4, "patch_size": 16},
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_it_computes_what_mmsegs_own_does(settings: dict[str, Any], size: tuple[int, int]) -> None:
    ours, theirs = make_pair(**settings)
    images = torch.randn(2, settings.get("in_channels", 3), *size)
    assert largest_difference(ours(images), theirs(images)) < 2e-5


def test_gradients_are_those_of_mmsegs_own() -> None:
    ours, theirs = make_pair(out_indices=(0, 2), drop_path_rate=0.0)
    images = torch.randn(2, 3, 40, 40)
    for model in (ours, theirs):
        sum(((index + 1) * found.square()).mean() for index, found in enumerate(model(images))).backward()
    wanted = to_timm({name: parameter.grad for name, parameter in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter.grad, wanted[name], atol=1e-5, rtol=1e-4), name


def test_another_grid_with_as_many_patches_is_resampled() -> None:
    model = TimmVisionTransformer(**SMALL)
    disturb(model)
    grid_1Dhw = model.pos_embed[:, 1:].reshape(1, 4, 6, 12).permute(0, 3, 1, 2)
    resized = F.interpolate(grid_1Dhw, (6, 4), mode="bicubic").permute(0, 2, 3, 1).reshape(1, 24, 12)
    wanted = torch.cat([model.pos_embed[:, :1] + model.cls_token, resized], 1)
    assert torch.allclose(model._pos_embed(torch.zeros(1, 6, 4, 12)), wanted, atol=1e-6)


def test_dropout_is_where_mmseg_has_it() -> None:
    ours, theirs = make_pair(drop_rate=0.5, attn_drop_rate=0.25)
    rates = {name: module.p for name, module in ours.named_modules() if isinstance(module, nn.Dropout) and module.p}
    inner = {"attn.attn_drop": 0.25, "attn.proj_drop": 0.5, "mlp.drop1": 0.5, "mlp.drop2": 0.5}
    assert rates == {"pos_drop": 0.5} | {f"blocks.{i}.{name}": rate for i in range(3) for name, rate in inner.items()}
    dropped = [module.p for module in theirs.modules() if isinstance(module, nn.Dropout) and module.p]
    assert dropped + [layer.attn.attn.dropout for layer in theirs.layers] == [0.5] * 10 + [0.25] * 3


def test_indices_count_from_either_end() -> None:
    ours, _ = make_pair(out_indices=(0, 1, 2))
    first, second, last = ours(torch.randn(1, 3, 32, 48))
    for given, wanted in ((-1, [2]), (1, [1]), ((-3, 2), [0, 2]), ([-1, -2, -3], [0, 1, 2])):
        model, _ = make_pair(out_indices=given)
        assert model.out_indices == wanted
    assert len({float(found.detach().sum()) for found in (first, second, last)}) == 3


def test_checkpointed_blocks_give_the_same() -> None:
    ours, _ = make_pair(out_indices=(0, 2))
    again = TimmVisionTransformer(**SMALL, out_indices=(0, 2), with_cp=True)
    again.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 32, 48)
    calls = []
    again.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    outputs = again(images)
    assert largest_difference(outputs, ours(images)) == 0
    sum(output.sum() for output in outputs).backward()
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm_cfg": {"type": "BN"}}, r"backbone\.norm_cfg=.*only dict\(type='LN'"),
        ({"norm_cfg": {"type": "LN", "requires_grad": False}}, r"backbone\.norm_cfg"),
        ({"act_cfg": {"type": "ReLU"}}, r"backbone\.act_cfg=.*'ReLU'"),
        ({"interpolate_mode": "nearest"}, r"backbone\.interpolate_mode='nearest'.*bilinear, bicubic"),
        ({"out_indices": (0, 3)}, r"backbone\.out_indices=\(0, 3\).*0 to 2"),
        ({"out_indices": -4}, r"backbone\.out_indices=-4"),
        ({"out_indices": ()}, r"backbone\.out_indices"),
        ({"init_cfg": {"type": "Normal", "std": 1}}, r"backbone\.init_cfg=.*Pretrained"),
        ({"init_cfg": {"type": "Pretrained", "checkpoint": "a"}, "pretrained": "b"}, "leave one of them out"),
    ],
)
def test_settings_that_are_not_supported_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TimmVisionTransformer(**(SMALL | settings))


def test_settings_that_nobody_has_are_refused() -> None:
    with pytest.raises(TypeError, match="output_cls_token"):
        MODELS.build({"type": "TimmVisionTransformer", "output_cls_token": True, **SMALL})


def test_it_is_made_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = TimmVisionTransformer(**SMALL, final_norm=True)
    assert {value.device.type for value in [*model.parameters(), *model.buffers()]} == {"meta"}
    assert not any(module._non_persistent_buffers_set for module in model.modules())
    model.to_empty(device="cpu").load_state_dict(TimmVisionTransformer(**SMALL, final_norm=True).state_dict())
    assert model(torch.randn(1, 3, 32, 48))[0].isfinite().all()


def test_every_weight_can_be_scored_at_another_size() -> None:
    class Pooled(nn.Module):
        """Mean of the maps, classified."""

        def __init__(self) -> None:
            super().__init__()
            self.backbone = TimmVisionTransformer(**SMALL, out_indices=(0, 2), final_norm=True)
            self.decode_head = nn.Linear(24, 3)

        def forward(self, images: Tensor) -> Tensor:
            return self.decode_head(torch.cat([found.mean((2, 3)) for found in self.backbone(images)], 1))

    model = Pooled().eval()
    disturb(model)
    inventory = take_inventory(model)
    assert inventory.head == ["decode_head.weight", "decode_head.bias"]
    assert inventory.skipped == {}
    images, labels = torch.randn(3, 3, 40, 24), torch.tensor([0, 2, 1])
    scores = estimate_sensitivity(model, [(images[:2], labels[:2]), (images[2:], labels[2:])], F.cross_entropy)
    wanted = one_by_one(model, images, labels, F.cross_entropy)
    assert scores.info.skipped == {}
    # Attention does not change with its key's bias, so that only rounding is left there.
    for name in (name for name in scores.names if not name.endswith("attn.k.bias")):
        assert relative_error(scores[name], pick(wanted, name)) < 2e-5, name


def shrink(value: Any) -> Any:
    """A config with fewer channels everywhere, and no group of ranks."""
    if isinstance(value, dict):
        return {key: shrink(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(shrink(item) for item in value)
    if value == "SyncBN":
        return "BN"
    return {1024: 16, 256: 8, 512: 16, 128: 4}.get(value, value) if isinstance(value, int) else value


@pytest.mark.parametrize("path", SETR, ids=lambda path: path.stem)
def test_a_setr_config_changes_its_type_alone(path: Path) -> None:
    config = shrink(Config.fromfile(path).model.to_dict())
    config["backbone"].update(img_size=(64, 64), num_heads=2)
    theirs_config = config | {"backbone": config["backbone"] | {"patch_bias": True}}
    ours_config = config | {"backbone": config["backbone"] | {"type": "TimmVisionTransformer"}}
    with DefaultScope.overwrite_default_scope("mmseg"):
        ours, theirs = (MODELS.build(Config(settings)._cfg_dict) for settings in (ours_config, theirs_config))
    assert type(ours.backbone) is TimmVisionTransformer and type(theirs.backbone) is VisionTransformer
    disturb(ours)
    theirs.load_state_dict(to_mmseg(ours.state_dict()), strict=True)
    images = torch.randn(1, 3, 64, 64)
    for model in (ours, theirs):
        model.eval()
    with torch.no_grad():
        # Logits of untrained heads on disturbed weights reach into the tens.
        assert torch.allclose(ours(images), theirs(images), atol=1e-4, rtol=1e-4)
        for head, other in zip(ours.auxiliary_head, theirs.auxiliary_head, strict=True):
            found, wanted = head(ours.extract_feat(images)), other(theirs.extract_feat(images))
            assert torch.allclose(found, wanted, atol=1e-4, rtol=1e-4)


def setr(**backbone: Any) -> dict[str, Any]:
    """The smallest SETR with one head."""
    head = {"type": "SETRUPHead", "in_channels": 12, "channels": 8, "num_classes": 3, "in_index": 0, "num_convs": 1}
    return {
        "type": "EncoderDecoder",
        "backbone": {"type": "TimmVisionTransformer", **SMALL, **backbone},
        "decode_head": head | {"norm_cfg": {"type": "BN"}},
        "test_cfg": {"mode": "whole"},
    }


@pytest.mark.parametrize("key", ["init_cfg", "pretrained"])
@pytest.mark.parametrize("kind", ["timm.safetensors", "mmseg.pth"])
def test_mmengine_initialises_it_from_a_file(tmp_path: Path, key: str, kind: str) -> None:
    source = TimmVisionTransformer(**SMALL)
    disturb(source)
    path = tmp_path / kind
    if kind == "mmseg.pth":
        torch.save({"meta": {}, "state_dict": to_mmseg(source.state_dict())}, path)
    else:
        save_file(source.state_dict(), path)
    value = {"type": "Pretrained", "checkpoint": str(path)} if key == "init_cfg" else str(path)
    model = MODELS.build(Config(setr(**{key: value}))._cfg_dict)
    assert not torch.equal(model.backbone.pos_embed, source.pos_embed)
    model.init_weights()
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.backbone.state_dict().items())
    # What the file lacks is not made up.
    with pytest.raises(UserError, match=r"2 of 42 keys are missing \(first: \['norm\.bias'\]\)"):
        MODELS.build(Config(setr(final_norm=True, **{key: value}))._cfg_dict).init_weights()


def test_without_a_file_the_initialisation_stays() -> None:
    model = MODELS.build(Config(setr())._cfg_dict)
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    model.init_weights()
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())
    # timm's: truncated normal of 0.02, biases zero.
    assert 0.01 < float(model.backbone.pos_embed.std()) < 0.03
    assert 0.01 < float(before["blocks.1.mlp.fc1.weight"].std()) < 0.03
    assert float(before["blocks.1.mlp.fc1.bias"].abs().max()) == 0


def test_loading_on_another_grid_is_what_mmseg_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = TimmVisionTransformer(**(SMALL | {"img_size": 40}), interpolate_mode="bilinear")
    disturb(source)
    path = tmp_path / "vit.pth"
    torch.save({"state_dict": to_mmseg(source.state_dict())}, path)
    for mode in ("bilinear", "bicubic"):
        settings = SMALL | {"interpolate_mode": mode, "init_cfg": {"type": "Pretrained", "checkpoint": str(path)}}
        ours, theirs = TimmVisionTransformer(**settings), VisionTransformer(**settings, patch_bias=True)
        with caplog.at_level(logging.INFO, logger="spt_dist"):
            ours.init_weights()
        theirs.init_weights()
        assert torch.allclose(ours.pos_embed, theirs.pos_embed, atol=1e-6)
        assert torch.equal(ours.cls_token, theirs.cls_token)
        assert "1 x 26 x 12 -> 1 x 25 x 12" in caplog.text
