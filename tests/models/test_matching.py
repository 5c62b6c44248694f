"""What a model takes of a file beside its backbone: its sum, a head that is kept, norms before and behind pooling."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spt_dist import UserError
from spt_dist.config import make_config
from spt_dist.models.checkpoints import check_sum, load_backbone
from spt_dist.models.classifier import build_classifier
from spt_dist.models.fingerprint import fingerprint
from spt_dist.models.mmseg_names import to_mmseg
from tests.models.weights_for_tests import SmallSegmentor, as_jax, differing, write
from tests.models_for_tests import make_vit

# ``make_vit``'s arguments.
SMALL: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def test_a_head_that_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "vit.safetensors", dict(make_vit().state_dict()))
    model = make_vit(seed=1)
    load_backbone(model, path, keep_head=True)
    assert differing(model, make_vit().state_dict()) == []
    built = build_classifier("vit_tiny_patch16_224", 10, SMALL, path, seed=3, keep_head=True)
    assert differing(built, make_vit().state_dict()) == []
    fresh = build_classifier("vit_tiny_patch16_224", 10, SMALL, path, seed=3)
    assert differing(fresh, make_vit().state_dict()) == ["head.weight", "head.bias"]
    assert fingerprint(fresh) == fingerprint(built)
    with pytest.raises(
        UserError, match=r"its head is for 10 classes \(head\.weight\), but model\.num_classes=7; .*keep_head"
    ):
        load_backbone(make_vit(num_classes=7), path, keep_head=True)
    headless = write(tmp_path / "headless.safetensors", dict(make_vit(num_classes=0).state_dict()))
    with pytest.raises(UserError, match=r"headless\.safetensors: holds no head\.bias, which model\.keep_head=True"):
        load_backbone(make_vit(), headless, keep_head=True)
    jax = as_jax(dict(make_vit().state_dict())) | {
        "pre_logits/kernel": np.zeros((24, 24), np.float32),
        "head/bias": np.zeros(10, np.float32),
    }
    np.savez(tmp_path / "in21k.npz", **jax)
    with pytest.raises(UserError, match=r"holds no head\.bias.*\(left out is head/\w+: reads the representation layer"):
        load_backbone(make_vit(), str(tmp_path / "in21k.npz"), keep_head=True)
    # What else is missing is not blamed on the head.
    short = {name: value for name, value in make_vit(num_classes=0).state_dict().items() if name != "norm.bias"}
    with pytest.raises(UserError, match=r"3 of 32 keys are missing"):
        load_backbone(make_vit(), write(tmp_path / "short.safetensors", short), keep_head=True)


def test_heads_of_a_segmentor_that_are_kept(tmp_path: Path) -> None:
    source = SmallSegmentor()
    for parameter in source.parameters():
        parameter.data += 1
    path = write(tmp_path / "segmentor.safetensors", dict(source.state_dict()))
    model = SmallSegmentor()
    load_backbone(model, path, keep_head=True)
    assert differing(model, source.state_dict()) == []


def test_a_norm_behind_the_pooling_starts_anew(tmp_path: Path) -> None:
    """As MAE is fine-tuned: the file's norm stands before the pooling, and this model has none there."""
    state = dict(make_vit(num_classes=0).state_dict())
    path = write(tmp_path / "mae.pth", state)
    pooled = make_vit(seed=1, global_pool="avg")
    load_backbone(pooled, path)
    assert torch.equal(pooled.fc_norm.weight, torch.ones(24)) and torch.equal(pooled.fc_norm.bias, torch.zeros(24))
    assert differing(pooled.blocks, make_vit(num_classes=0).blocks.state_dict()) == []
    # One that the file has is taken, and a norm that the model has before the pooling is never left out.
    own = write(tmp_path / "tuned.pth", dict(make_vit(seed=2, global_pool="avg").state_dict()))
    load_backbone(pooled, own)
    assert torch.equal(pooled.fc_norm.weight, make_vit(seed=2, global_pool="avg").fc_norm.weight)
    both = {"norm.weight": torch.ones(24), "norm.bias": torch.ones(24)}
    load_backbone(pooled, write(tmp_path / "both.pth", dict(make_vit(seed=3, global_pool="avg").state_dict()) | both))
    assert torch.equal(pooled.fc_norm.weight, make_vit(seed=3, global_pool="avg").fc_norm.weight)
    for model, file in ((make_vit(), own), (make_vit(global_pool="avg", final_norm=False), path)):
        with pytest.raises(UserError, match="does not fit this backbone"):
            load_backbone(model, file)
    without = write(tmp_path / "without.pth", {name: state[name] for name in state if not name.startswith("norm.")})
    with pytest.raises(UserError, match=r"2 of 30 keys are missing \(first: \['fc_norm\.bias'\]\)"):
        load_backbone(make_vit(global_pool="avg"), without)


def test_the_same_weights_in_other_files_have_one_fingerprint(tmp_path: Path) -> None:
    state = dict(make_vit(num_classes=0).state_dict())
    decoder = {"mask_token": torch.ones(1, 1, 8), "decoder_pos_embed": torch.ones(1, 5, 8)}
    files = [
        write(tmp_path / "timm.safetensors", state),
        write(tmp_path / "mmseg.pth", to_mmseg(state)),
        write(tmp_path / "mae.pth", {"model": state | decoder}),
        write(tmp_path / "moco.pth", {"state_dict": {f"module.base_encoder.{name}": state[name] for name in state}}),
    ]
    np.savez(tmp_path / "jax.npz", **as_jax(state))
    found = set()
    for file in [*files, str(tmp_path / "jax.npz")]:
        model = make_vit(seed=1)
        load_backbone(model, file)
        found.add(fingerprint(model))
    assert found == {fingerprint(make_vit(num_classes=0))}


def test_the_sum_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "vit.pth"
    # More than one block is read.
    path.write_bytes(bytes(range(256)) * 5000)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for wanted in (digest, digest[:8], digest[:17].upper()):
        check_sum(str(path), wanted)
    for wanted in ("0123abcd", digest[:-1] + ("0" if digest[-1] != "0" else "1"), digest[1:]):
        with pytest.raises(UserError) as caught:
            check_sum(str(path), wanted)
        assert str(path) in str(caught.value) and digest in str(caught.value) and repr(wanted) in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        check_sum(str(tmp_path / "none.pth"), digest)


@pytest.mark.parametrize("value", ["0123abc", "0123abcg", "0" * 65, "", " 0123abcd"])
def test_what_is_no_sum_is_refused_in_the_config(value: str) -> None:
    with pytest.raises(UserError, match=r"model\.sha256=.* has to be the 64 hexadecimal digits"):
        make_config(config_values(checkpoint="file.pth", sha256=value), Path("run.py"))


def test_what_a_config_says_of_no_checkpoint_is_refused() -> None:
    for key, value in (("sha256", "0123ABCD"), ("keep_head", True)):
        with pytest.raises(
            UserError, match=rf"model\.{key}={value!r} is about a checkpoint, but model\.checkpoint is None"
        ):
            make_config(config_values(**{key: value}), Path("run.py"))
        assert (
            getattr(make_config(config_values(checkpoint="file.pth", **{key: value}), Path("run.py")).model, key)
            == value
        )


def config_values(**model: Any) -> dict[str, Any]:
    """A config whose model has these fields."""
    return {
        "model": {"name": "vit_tiny_patch16_224", "num_classes": 10, **model},
        "data": {"type": "digits"},
        "method": {"type": "linear"},
        "train": {"epochs": 1, "batch_size": 8, "lr": 0.1},
    }
