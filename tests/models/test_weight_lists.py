"""Weights in several files with a list of them; huggingface_hub and transformers write them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor

from spt_dist import UserError
from spt_dist.models.checkpoints import check_sum, load_backbone
from spt_dist.models.fingerprint import fingerprint
from spt_dist.models.weight_files import StoredWeights, open_weights
from spt_dist.models.weight_lists import files_of
from tests.models_for_tests import make_vit

STATE = {"b": torch.arange(12.0).reshape(4, 3), "a": torch.ones(5, dtype=torch.bfloat16), "c": torch.tensor(3)}
Change = Callable[[Path, dict[str, str]], None]


def write(folder: Path, state: dict[str, Tensor], safe: bool = True, largest: int = 48) -> Path:
    """The list of files of at most so many bytes."""
    save_torch_state_dict(state, folder, max_shard_size=largest, safe_serialization=safe)
    (path,) = folder.glob("*.index.json")
    return path


@pytest.mark.parametrize("safe", [True, False])
def test_what_is_read_is_what_was_cut(tmp_path: Path, safe: bool) -> None:
    path = write(tmp_path, STATE, safe)
    weights: StoredWeights = open_weights(path)
    assert len(files_of(path)) == 2 and sorted(weights.names()) == ["a", "b", "c"]
    for name, tensor in STATE.items():
        assert torch.equal(weights.read(name), tensor) and weights.read(name).dtype == tensor.dtype
        assert weights.shape(name) == tuple(tensor.shape)
    assert [weights.dtype(name) for name in STATE] == ["F32", "BF16", "I64"]
    assert torch.equal(weights.read_rows("b", 1, 3), STATE["b"][1:3])


def test_a_backbone_and_the_sum_of_its_files(tmp_path: Path) -> None:
    model = make_vit(seed=1)
    path = write(tmp_path, model.state_dict(), largest=20_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert files_of(path) == files and len(files) > 2
    other = make_vit(seed=2)
    load_backbone(other, str(path))
    assert fingerprint(other) == fingerprint(model)
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    assert check_sum(str(path), digest[:10]) == digest
    files[1].write_bytes(files[0].read_bytes())
    with pytest.raises(UserError, match="its SHA-256 is"):
        check_sum(str(path), digest)


def lose(path: Path, of: dict[str, str]) -> None:
    (path.parent / of["b"]).unlink()


def cut(path: Path, of: dict[str, str]) -> None:
    file = path.parent / of["b"]
    file.write_bytes(file.read_bytes()[:-4])


def hold_less(path: Path, of: dict[str, str]) -> None:
    save_file({"d": STATE["b"]}, path.parent / of["b"])


def hold_more(path: Path, of: dict[str, str]) -> None:
    save_file({"b": STATE["b"], "z": STATE["b"].clone()}, path.parent / of["b"])


def name_the_other(path: Path, of: dict[str, str]) -> None:
    path.write_text(json.dumps({"weight_map": of | {"b": of["a"]}}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose, "lists model-00001-of-00002.safetensors, which is not beside it"),
        (cut, "not a readable safetensors file"),
        (hold_less, "b is in model-00001-of-00002.safetensors: only the list says so"),
        (hold_more, "z is in model-00001-of-00002.safetensors: the list does not say so"),
        (name_the_other, "b is in model-00002-of-00002.safetensors: only the list says so"),
    ],
)
def test_files_that_do_not_belong_together(tmp_path: Path, change: Change, message: str) -> None:
    path = write(tmp_path, STATE)
    change(path, json.loads(path.read_text())["weight_map"])
    if change is lose:
        with pytest.raises(UserError, match="which is not beside it"):
            check_sum(str(path), "0" * 8)
    with pytest.raises(UserError) as caught:
        open_weights(path)
    assert message in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": 3}}', "a is in 3, which names no"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "which names no"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "which names no"),
        ('{"weight_map": {"a": "a\\u0000.bin"}}', "which names no"),
        ('{"weight_map": {"a": "\\ud800.bin"}}', "which names no"),
        ('{"weight_map": {"a": "model.safetensors.index.json"}}', "which names no"),
    ],
)
def test_what_is_no_list(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        open_weights(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        open_weights(path)
