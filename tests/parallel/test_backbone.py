"""Backbones that are spread over the ranks from the start, against whole ones."""

import hashlib
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spt_dist import UserError
from spt_dist.models import checkpoints
from spt_dist.models.checkpoints import WeightsFile
from spt_dist.models.classifier import build_classifier
from spt_dist.models.fingerprint import fingerprint
from spt_dist.models.sharded import is_part, whole_value
from spt_dist.models.weight_files import StoredWeights, open_weights
from spt_dist.parallel.backbone import FSDP, WHOLE, ZERO3, build_backbone
from spt_dist.sections import EngineConfig, ModelConfig
from tests.models.weights_for_tests import as_jax, write
from tests.models_for_tests import make_vit
from tests.ranks import run_ranks
from tests.tuning.plans_for_tests import SMALL_CONVNEXT, SMALL_SWIN

CPU = torch.device("cpu")
VIT: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "vit": ("vit_tiny_patch16_224", VIT, 16),
    "registers": ("vit_tiny_patch16_224", VIT | {"reg_tokens": 2, "init_values": 0.1}, 16),
    "windows": ("swin_tiny_patch4_window7_224", SMALL_SWIN, 56),
    "convolutions": ("convnext_atto", SMALL_CONVNEXT, 128),
    "relative positions": ("beit_base_patch16_224", VIT, 16),
}


def write_checkpoint(path: Path, family: str) -> ModelConfig:
    """Random weights as a pre-trained checkpoint would come, and the config of the model."""
    name, kwargs, _ = FAMILIES[family]
    model = build_classifier(name, 5, kwargs)
    torch.manual_seed(7)
    state = {key: value + 0.1 * torch.randn_like(value) for key, value in model.state_dict().items()}
    save_file({key: value for key, value in state.items() if not key.startswith("head.fc")}, path)
    return ModelConfig(name=name, num_classes=5, kwargs=kwargs, checkpoint=str(path))


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, whole."""
    return {name: whole_value(value) for name, value in [*model.named_parameters(), *model.named_buffers()]}


def differences(config: ModelConfig, form: str, size: int, shard_size: int | None) -> tuple[list[str], int]:
    """What of a spread model is not the whole one's; and how many weights this rank holds of it."""
    zero = EngineConfig(type="deepspeed", zero_stage=3)
    engine = zero if form == ZERO3 else EngineConfig(type="fsdp", shard_size=shard_size)
    whole = build_backbone(config, EngineConfig(), WHOLE, 3, CPU)
    spread = build_backbone(config, engine, form, 3, CPU)
    expected, found = values_of(whole.model), values_of(spread.model)
    assert expected.keys() == found.keys()
    wrong = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert whole.fingerprint == spread.fingerprint == fingerprint(whole.model) == fingerprint(spread.model)
    if form == FSDP:
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            outputs = [backbone.model.eval()(images) for backbone in (whole, spread)]
        wrong += [] if torch.allclose(*outputs, atol=1e-6) else ["outputs"]
    parameters = list(spread.model.parameters())
    held = sum(getattr(p, "ds_tensor", p.to_local() if hasattr(p, "to_local") else p).numel() for p in parameters)
    return wrong, held


CASES = [(family, 2) for family in FAMILIES] + [(family, size) for family in ("vit", "windows") for size in (1, 4)]


@pytest.mark.distributed
@pytest.mark.parametrize("form", [FSDP, ZERO3])
@pytest.mark.parametrize(("family", "world_size"), CASES)
def test_spread_as_it_is_loaded(tmp_path: Path, family: str, world_size: int, form: str) -> None:
    config = write_checkpoint(tmp_path / "backbone.safetensors", family)
    total = sum(p.numel() for p in build_classifier(config.name, 5, config.kwargs).parameters())
    for wrong, held in run_ranks(differences, world_size, config, form, FAMILIES[family][2], None):
        assert wrong == []
        # Head and class token are whole under FSDP2, and ZeRO-3 rounds each part up.
        assert total / world_size <= held + 600
        assert held <= total / world_size + 600


@pytest.mark.distributed
def test_groups_of_ranks_share_a_copy(tmp_path: Path) -> None:
    config = write_checkpoint(tmp_path / "backbone.safetensors", "vit")
    total = sum(p.numel() for p in build_classifier(config.name, 5, config.kwargs).parameters())
    for wrong, held in run_ranks(differences, 4, config, FSDP, 16, 2):
        assert wrong == []
        assert abs(held - total / 2) < 600
    with pytest.raises(pytest.fail.Exception, match=r"shard_size=3 does not divide the number of ranks, 4"):
        run_ranks(differences, 4, config, FSDP, 16, 3)


def bytes_read(config: ModelConfig) -> tuple[int, int]:
    """Bytes of weights that this rank reads in rows, and whole, to have a model spread by FSDP2."""
    counts = {"read": 0, "read_rows": 0}
    for method in counts:
        original = getattr(WeightsFile, method)

        def counted(self: WeightsFile, *args: Any, method: str = method, original: Any = original) -> Tensor:
            tensor: Tensor = original(self, *args)
            counts[method] += tensor.nbytes
            return tensor

        setattr(WeightsFile, method, counted)
    model = build_backbone(config, EngineConfig(type="fsdp"), FSDP, 3, CPU).model
    assert any(is_part(parameter) for parameter in model.parameters())
    return counts["read_rows"], counts["read"]


@pytest.mark.distributed
def test_each_rank_reads_its_own_rows(tmp_path: Path) -> None:
    path = tmp_path / "backbone.safetensors"
    config = write_checkpoint(path, "vit")
    size = path.stat().st_size
    first, second = run_ranks(bytes_read, 2, config)
    assert first[0] + second[0] == pytest.approx(size, rel=0.05)
    assert second[0] < 0.6 * size
    # Beside its rows: cls_token. Rank 0 hashes the file, tensor by tensor.
    assert second[1] < 200
    assert first[1] == pytest.approx(size, rel=0.1)


def not_as_in_the_file(config: ModelConfig, path: str) -> list[str]:
    """What of the models in every form is not what a file under timm's names has, head included."""
    wanted, wrong = load_file(path), []
    for form in (WHOLE, FSDP, ZERO3):
        engine = EngineConfig(type="deepspeed", zero_stage=3) if form == ZERO3 else EngineConfig(type="fsdp")
        found = values_of(build_backbone(config, engine, form, 3, CPU).model)
        wrong += [f"{form}: {name}" for name, value in wanted.items() if not torch.equal(found[name], value)]
    return wrong


@pytest.mark.distributed
@pytest.mark.parametrize("keep_head", [True, False])
def test_the_head_of_the_file_is_taken_if_it_is_wanted(tmp_path: Path, keep_head: bool) -> None:
    path = tmp_path / "backbone.safetensors"
    config = replace(write_checkpoint(path, "vit"), keep_head=keep_head)
    heads = [f"{form}: head.{own}" for form in (WHOLE, FSDP, ZERO3) for own in ("bias", "weight")]
    for wrong in run_ranks(not_as_in_the_file, 2, config, str(path)):
        assert sorted(wrong) == sorted([] if keep_head else heads)


@pytest.mark.distributed
def test_what_is_made_of_a_file_is_the_same_in_every_form(tmp_path: Path) -> None:
    """Transposed and joined matrices of JAX, positions of another grid, and patches of another size."""
    np.savez(tmp_path / "vit.npz", **as_jax(make_vit(img_size=32).state_dict()))
    kwargs = VIT | {"img_size": 24, "patch_size": 4}
    config = ModelConfig(
        name="vit_tiny_patch16_224", num_classes=5, kwargs=kwargs, checkpoint=str(tmp_path / "vit.npz")
    )
    for form in (FSDP, ZERO3):
        assert [wrong for wrong, _ in run_ranks(differences, 2, config, form, 24, None)] == [[], []]


class Watched:
    """A file of weights that knows how much of what it has read is in memory."""

    def __init__(self, file: StoredWeights, is_mapped: bool) -> None:
        self.file, self.is_mapped, self.now, self.most, self.largest = file, is_mapped, 0, 0, 0
        self.names, self.shape, self.dtype = file.names, file.shape, file.dtype

    def keep_count(self, tensor: Tensor) -> Tensor:
        """Count a tensor until it is gone."""
        # safetensors maps files into memory, and of a map nothing is read but what is used.
        size = tensor.nbytes if self.is_mapped else tensor.untyped_storage().nbytes()
        self.now += size
        self.most, self.largest = max(self.most, self.now), max(self.largest, size)
        weakref.finalize(tensor, self.release, size)
        return tensor

    def release(self, size: int) -> None:
        self.now -= size

    def read(self, name: str) -> Tensor:
        return self.keep_count(self.file.read(name))

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.keep_count(self.file.read_rows(name, start, stop))


def memory_of_loading(config: ModelConfig, form: str) -> tuple[int, int]:
    """The most bytes of the file that are in memory at once on this rank, and those of the largest tensor it reads."""
    opened: list[Watched] = []

    def open_watched(path: Path) -> Watched:
        opened.append(Watched(open_weights(path), path.suffix == ".safetensors"))
        return opened[-1]

    engine = EngineConfig(type="deepspeed", zero_stage=3) if form == ZERO3 else EngineConfig(type="fsdp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "open_weights", open_watched)
        build_backbone(config, engine, form, 3, CPU)
    (file,) = opened
    assert file.largest > 0 and file.now == 0
    return file.most, file.largest


@pytest.mark.distributed
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".npz"])
def test_a_rank_has_no_more_of_the_file_in_memory_than_it_copies(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"vit{suffix}"
    state = dict(make_vit(img_size=32, depth=8).state_dict())
    if suffix == ".npz":
        np.savez(path, **as_jax(state))
    else:
        write(path, state)
    config = ModelConfig(name="vit_tiny_patch16_224", num_classes=5, kwargs=VIT | {"depth": 8}, checkpoint=str(path))
    patches, matrix = 4 * 24 * 3 * 8 * 8, 4 * 24 * 96
    assert path.stat().st_size > 10 * patches
    first, second = run_ranks(memory_of_loading, 2, config, FSDP)
    # Rank 0 hashes whole tensors, and lets go of one when it has the next.
    assert first[1] == patches and first[0] <= patches + matrix
    # The other rank reads half of each, but for what JAX has in another order.
    assert second == ((patches, patches) if suffix == ".npz" else (patches // 2, patches // 2))
    for most, largest in run_ranks(memory_of_loading, 2, config, ZERO3):
        assert largest == patches and most <= patches + matrix


def refuse(config: ModelConfig) -> str:
    """What is said about a checkpoint that does not fit."""
    with pytest.raises(UserError) as caught:
        build_backbone(config, EngineConfig(type="fsdp"), FSDP, 3, CPU)
    return str(caught.value)


@pytest.mark.distributed
def test_a_checkpoint_of_another_model_is_refused_on_every_rank(tmp_path: Path) -> None:
    config = write_checkpoint(tmp_path / "backbone.safetensors", "vit")
    other = ModelConfig(**{**vars(config), "kwargs": VIT | {"embed_dim": 48}})
    for message in run_ranks(refuse, 2, other):
        assert "has shape" in message and "backbone.safetensors" in message


@pytest.mark.distributed
def test_another_file_than_is_meant_is_refused_on_every_rank(tmp_path: Path) -> None:
    path = tmp_path / "backbone.safetensors"
    config = write_checkpoint(path, "vit")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for message in run_ranks(refuse, 2, replace(config, sha256="0123abcd")):
        assert f"{path}: its SHA-256 is {digest}, but model.sha256='0123abcd'" in message
    # It is looked at before anything else.
    path.write_bytes(path.read_bytes()[:-9])
    for message in run_ranks(refuse, 2, replace(config, sha256=digest)):
        assert "its SHA-256 is" in message
    assert (
        run_ranks(differences, 1, replace(write_checkpoint(path, "vit"), sha256=digest[:12]), FSDP, 16, None)[0][0]
        == []
    )
