"""PyTorch files with more in them than weights, and files whose names do not tell what they are."""

import argparse
import logging
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from spt_dist import UserError
from spt_dist.models.weight_files import open_weights


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_weights(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def configuration() -> dict[str, object]:
    """A dict of a class ``yacs.config.CfgNode`` with attributes, as Swin's training saves one."""
    module = ModuleType("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})  # type: ignore[attr-defined]
    sys.modules["yacs.config"] = module
    found = module.CfgNode(MODEL=module.CfgNode(NAME="swin"))
    found.__dict__["__immutable__"] = True
    return found


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".pth.tar"])
def test_what_training_saves_beside_the_weights(
    tmp_path: Path, suffix: str, zipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "yacs", ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", ModuleType("yacs.config"))
    content = {
        "model": {"weight": torch.arange(6.0).reshape(3, 2)},
        "args": argparse.Namespace(lr=np.float32(3), output_dir="out"),
        "max_accuracy": np.float64(81.3),
        "config": configuration(),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3, 2)}}, "param_groups": [{"lr": np.float64(0.1)}]},
    }
    path = tmp_path / f"checkpoint{suffix}"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    # Neither is yacs needed to read it.
    del sys.modules["yacs.config"]
    before = set(torch.serialization.get_safe_globals())
    weights = open_weights(path)
    assert weights.names() == ["weight"]
    assert torch.equal(weights.read("weight"), content["model"]["weight"])
    assert set(torch.serialization.get_safe_globals()) == before


def test_scalars_of_numpys_earlier_name(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": {"weight": torch.ones(2)}, "best": np.float64(81.3)}, path, _use_new_zipfile_serialization=0)
    content = path.read_bytes()
    assert b"numpy._core.multiarray" in content
    path.write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert open_weights(path).names() == ["weight"]


def test_code_beside_the_weights_is_never_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return exec, ("raise SystemExit",)

    path = tmp_path / "checkpoint.pth"
    torch.save({"model": {"weight": torch.ones(2)}, "args": argparse.Namespace(trap=Trap())}, path)
    message = refusal(path)
    assert "exec beside its weights, and reading such objects can run any code" in message
    # Publishers keep the weights under different keys: no command would be right for all.
    assert "weights_only=False" in message and "write the state dict in it, alone, with torch.save" in message
    assert "python -c" not in message and "state_dict" not in message


def test_torchscript_archives(tmp_path: Path) -> None:
    path = tmp_path / "ViT-B-16.pt"
    with pytest.warns(DeprecationWarning):
        torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(path)
    message = refusal(path)
    assert message.startswith(f"{path}: a TorchScript archive, which holds a program, as OpenAI's CLIP files do; take")


@pytest.mark.parametrize(
    ("taken", "others"),
    [("model", ["model_ema"]), ("state_dict", ["model", "state_dict_ema"]), ("model", []), (None, [])],
)
def test_other_weights_in_the_file_are_told(
    tmp_path: Path, taken: str | None, others: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    state = {"weight": torch.ones(2)}
    content = {taken: state} if taken else state
    content |= {other: {"weight": torch.zeros(2)} for other in others}
    beside = {"epoch": 3, "scaler": {"scale": 2.0}, "lr_scheduler": {}, "optimizer": {"state": {0: torch.ones(1)}}}
    path = tmp_path / "checkpoint.pth"
    torch.save(content | (beside if taken else {}), path)
    with caplog.at_level(logging.INFO):
        assert torch.equal(open_weights(path).read("weight"), state["weight"])
    found = [record.getMessage() for record in caplog.records]
    told = f"{path}: took the weights under {taken}, not those under {', '.join(others)}"
    assert found == ([told] if others else [])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("name", "make", "told"),
    [
        (7, torch.Tensor.clone, "a tensor is named 7, which is no text"),
        ("b", torch.Tensor.to_sparse, "b is a sparse tensor"),
        ("b", torch.Tensor.to_sparse_csr, "b is a sparse tensor"),
        ("b", lambda value: value.to("meta"), "b is a tensor without numbers"),
        ("b", lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8), "b is a quantised tensor"),
    ],
)
def test_what_is_no_plain_tensor(
    tmp_path: Path, name: object, make: Callable[[Tensor], Tensor], told: str, wrapped: bool
) -> None:
    state = {"a": torch.ones(2, 2), name: make(torch.ones(2, 2))}
    path = tmp_path / "a.pth"
    torch.save({"model": state} if wrapped else state, path)
    assert told in refusal(path)


@pytest.mark.parametrize("name", ["a.pth", "a.ckpt", "a", "a.npz.backup", "checkpoint-3.weights"])
@pytest.mark.parametrize("kind", ["zip", "pickle", "npz", "compressed npz", "safetensors"])
def test_the_content_tells_whose_a_file_is(tmp_path: Path, name: str, kind: str) -> None:
    path, state = tmp_path / name, {"weight": torch.arange(6.0).reshape(3, 2)}
    if kind in ("zip", "pickle"):
        torch.save({"model": state}, path, _use_new_zipfile_serialization=kind == "zip")
    elif kind == "safetensors":
        save_file(state, path)
    else:
        with path.open("wb") as file:
            (np.savez if kind == "npz" else np.savez_compressed)(file, weight=state["weight"].numpy())
    weights = open_weights(path)
    assert weights.names() == ["weight"]
    assert weights.dtype("weight") == "F32"
    assert torch.equal(weights.read("weight"), state["weight"])


@pytest.mark.parametrize("start", [b"\x80\x02", b"PK"])
def test_safetensors_whose_length_looks_like_another_container(tmp_path: Path, start: bytes) -> None:
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    length = int.from_bytes(start, "little")
    assert length % 8 == 0 and length > len(header)
    path = tmp_path / "a"
    path.write_bytes(start.ljust(8, b"\0") + header.ljust(length) + np.float32(3).tobytes())
    assert torch.equal(open_weights(path).read("a"), torch.tensor([3.0]))


def test_damaged_files_are_told_as_what_they_are(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(99)}, tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    kinds = {"a.ckpt": "PyTorch", "a": "PyTorch", "a.safetensors": "safetensors", "a.npz": ".npz"}
    for name, kind in kinds.items():
        (tmp_path / name).write_bytes(content[:-100])
        assert f"not a readable {kind} file" in refusal(tmp_path / name)
    (tmp_path / "b.ckpt").write_bytes(pickle.dumps([1], 2))
    assert "not a readable PyTorch file" in refusal(tmp_path / "b.ckpt")
    for name, kind in {"e.pth": "PyTorch", "e.npz": ".npz", "e.ckpt": "safetensors", "e": "safetensors"}.items():
        (tmp_path / name).write_bytes(b"")
        assert f"not a readable {kind} file" in refusal(tmp_path / name)


def test_words_for_dtypes(tmp_path: Path) -> None:
    """Safetensors' own for the same tensors are the oracle."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16)
    state = {str(dtype): torch.ones(2).to(dtype) for dtype in (*dtypes, torch.int8, torch.uint8, torch.bool)}
    torch.save(state, tmp_path / "a.pth")
    save_file(state, tmp_path / "a.safetensors")
    ours, theirs = open_weights(tmp_path / "a.pth"), open_weights(tmp_path / "a.safetensors")
    assert {name: ours.dtype(name) for name in state} == {name: theirs.dtype(name) for name in state}
