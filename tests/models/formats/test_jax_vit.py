"""ViTs of JAX against timm's own reader of ``.npz`` files."""

import spt_dist  # noqa: F401  # isort: skip

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models.formats.published import load
from tests.models_for_tests import make_vit

WIDTH, HEADS, HIDDEN, PATCH = 24, 2, 96, 8
Arrays = dict[str, np.ndarray]


def make_arrays(
    attention: int = 1, norm: int = 2, mlp: int = 3, num_classes: int = 10, has_token: bool = True, depth: int = 2
) -> Arrays:
    """Random numbers as vision_transformer's checkpoints hold them; submodules have the numbers that are given."""
    random = np.random.default_rng(0)
    width_of_a_head = WIDTH // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "embedding/kernel": (PATCH, PATCH, 3, WIDTH),
        "embedding/bias": (WIDTH,),
        "Transformer/encoder_norm/scale": (WIDTH,),
        "Transformer/encoder_norm/bias": (WIDTH,),
    }
    shapes |= {"cls": (1, 1, WIDTH)} if has_token else {}
    shapes["Transformer/posembed_input/pos_embedding" if attention else "pos_embedding"] = (1, 4 + has_token, WIDTH)
    shapes |= {"head/kernel": (WIDTH, num_classes), "head/bias": (num_classes,)} if num_classes else {}
    for block in range(depth):
        stem = f"Transformer/encoderblock_{block}"
        for part in ("query", "key", "value"):
            name = f"{stem}/MultiHeadDotProductAttention_{attention}/{part}"
            shapes |= {f"{name}/kernel": (WIDTH, HEADS, width_of_a_head), f"{name}/bias": (HEADS, width_of_a_head)}
        name = f"{stem}/MultiHeadDotProductAttention_{attention}/out"
        shapes |= {f"{name}/kernel": (HEADS, width_of_a_head, WIDTH), f"{name}/bias": (WIDTH,)}
        for number, sizes in enumerate([(WIDTH, HIDDEN), (HIDDEN, WIDTH)]):
            name = f"{stem}/MlpBlock_{mlp}/Dense_{number}"
            shapes |= {f"{name}/kernel": sizes, f"{name}/bias": sizes[1:]}
        for number in (0, norm):
            shapes |= {f"{stem}/LayerNorm_{number}/{own}": (WIDTH,) for own in ("scale", "bias")}
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def read_by_timm(arrays: Arrays, path: Path, **kwargs: object) -> dict[str, torch.Tensor]:
    np.savez(path, **arrays)
    model = make_vit(1, **kwargs)
    model.load_pretrained(str(path))
    return model.state_dict()


def differing(model: torch.nn.Module, wanted: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, value in model.state_dict().items() if not torch.equal(value.float(), wanted[name])]


@pytest.mark.parametrize("prefix", ["", "opt/target/"])
@pytest.mark.parametrize("compressed", [False, True])
def test_vision_transformer(tmp_path: Path, prefix: str, compressed: bool) -> None:
    path = tmp_path / "ViT-B_16.npz"
    arrays = {prefix + name: value for name, value in make_arrays().items()}
    wanted = read_by_timm(arrays, path)
    training = ("opt/state/step", "opt/state/param_states/cls/momentum", "extra/time", "step", "global_step")
    state = dict.fromkeys(training, np.array(3)) if prefix else {}
    (np.savez_compressed if compressed else np.savez)(path, **arrays, **state)
    model, translation = load(make_vit(2), path)
    assert differing(model, wanted) == []
    assert translation.format == "JAX .npz"
    assert translation.unused == dict.fromkeys(state, "of the training, or of another tower")
    assert translation.sources["blocks.1.attn.qkv.weight"].how == "q, k, v joined, transposed"
    assert translation.sources["patch_embed.proj.weight"].how == "channels first"


@pytest.mark.parametrize("prefix", ["params/", "params/img/"])
def test_big_vision(tmp_path: Path, prefix: str) -> None:
    """No class token; submodules are numbered by kind."""
    path = tmp_path / "vit.npz"
    options = {"class_token": False, "global_pool": "avg", "fc_norm": False}
    arrays = make_arrays(attention=0, norm=1, mlp=0, has_token=False)
    arrays = {prefix + name: value for name, value in arrays.items()}
    wanted = read_by_timm(arrays, path, **options)
    names = ("params/t", "params/b", "params/txt/Encoder_0/encoder_norm/scale", "opt/0/count")
    others = dict.fromkeys(names, np.ones(1, np.float32))
    np.savez(path, **arrays, **(others if prefix == "params/img/" else {}))
    model, translation = load(make_vit(2, **options), path)
    assert differing(model, wanted) == []
    assert translation.unused.keys() == (others.keys() if prefix == "params/img/" else set())


def test_what_has_no_known_place_beside_a_tower_stays(tmp_path: Path) -> None:
    unknown = ["params/audio/embedding/kernel", "params/img2/cls", "params/temperature", "optimum/step", "stepper"]
    arrays = {f"params/img/{name}": value for name, value in make_arrays().items()}
    np.savez(tmp_path / "vit.npz", **arrays, **dict.fromkeys(unknown, np.ones(1, np.float32)))
    _, translation = load(make_vit(2), tmp_path / "vit.npz", ignored=tuple(unknown))
    assert translation.unused == {}
    assert all(translation.sources[name].names == (name,) for name in unknown)


def test_the_representation_layer_of_in21k_is_left_with_the_head_that_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "ViT-B_16.npz"
    arrays = make_arrays(num_classes=21)
    wanted = read_by_timm(arrays, path, num_classes=0)
    pre_logits = {"pre_logits/kernel": np.ones((WIDTH, WIDTH)), "pre_logits/bias": np.ones(WIDTH)}
    np.savez(path, **arrays, **pre_logits)
    model, translation = load(make_vit(2, num_classes=0), path)
    assert differing(model, wanted) == []
    assert translation.unused.keys() == {*pre_logits, "head/kernel", "head/bias"}
    assert not any(name.startswith("head") for name in translation.sources)
    # Without a head, as files are that were cut down.
    np.savez(path, **{name: value for name, value in arrays.items() if not name.startswith("head")})
    model, translation = load(make_vit(2, num_classes=0), path)
    assert differing(model, wanted) == []
    assert translation.unused == {}


def test_what_no_vit_has_stays_under_its_own_name(tmp_path: Path) -> None:
    path = tmp_path / "R50+ViT-B_16.npz"
    extra = {"conv_root/kernel": np.ones((7, 7, 3, 2)), "Transformer/encoderblock_0/LayerNorm_0/mean": np.ones(WIDTH)}
    # Query, key and value that do not belong together, and a layer that is none.
    arrays = make_arrays() | {
        "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/key/bias": np.ones((3, 2)),
        "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/out/kernel": np.ones((WIDTH, WIDTH)),
    }
    np.savez(path, **arrays, **extra)
    with pytest.raises(AssertionError, match="conv_root/kernel"):
        load(make_vit(2), path)
    stem = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/"
    others = [f"{stem}{part}/bias" for part in ("query", "key", "value")]
    others.append("Transformer/encoderblock_0/MultiHeadDotProductAttention_1/out/kernel")
    missing = ("blocks.1.attn.qkv.bias", "blocks.0.attn.proj.weight")
    _, translation = load(make_vit(2), path, ignored=(*missing, "Transformer/", *extra))
    assert all(translation.sources[name].names == (name,) for name in [*extra, *others])
