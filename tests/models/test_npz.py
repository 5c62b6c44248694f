"""``.npz`` files against numpy's own reader; damaged and hostile ones."""

import io
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spt_dist import UserError
from spt_dist.models.weight_files import open_weights

MIB = 1 << 20


def make_arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    floats = random.standard_normal((5, 3, 2))
    return {
        "a/kernel": floats.astype(np.float32),
        "a/half": floats.astype(np.float16),
        "b": floats,
        "big-endian": floats.astype(">f4"),
        "fortran": np.asfortranarray(floats.astype(np.float32)),
        "fortran, big-endian": np.asfortranarray(floats.astype(">i4")),
        "scalar": np.float32(3.5) * np.ones([], np.float32),
        "none": np.ones((0, 3), np.float32),
        "no columns": np.ones((3, 0), np.float32),
        "integers": np.arange(6).reshape(3, 2),
        "flags": np.array([True, False]),
    }


def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version)
    return buffer.getvalue()


def write_archive(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_weights(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("compressed", [False, True])
def test_arrays_are_what_numpy_reads(tmp_path: Path, compressed: bool) -> None:
    path = tmp_path / "vit.npz"
    (np.savez_compressed if compressed else np.savez)(path, **make_arrays())
    weights = open_weights(path)
    wanted = np.load(path)
    assert weights.names() == list(wanted)
    for name in wanted:
        assert weights.shape(name) == wanted[name].shape
        found = weights.read(name)
        assert found.is_contiguous()
        native = wanted[name].astype(wanted[name].dtype.newbyteorder("="))
        assert found.dtype == torch.from_numpy(native).dtype
        assert tuple(found.shape) == wanted[name].shape
        assert np.array_equal(found.numpy(), native)
        if found.ndim:
            for start, stop in ((0, 2), (1, 3), (2, 2), (2, 9), (0, 0)):
                assert np.array_equal(weights.read_rows(name, start, stop).numpy(), native[start:stop]), name
    dtypes = [weights.dtype(name) for name in ("a/kernel", "a/half", "b", "big-endian", "integers", "flags")]
    assert dtypes == ["F32", "F16", "F64", "F32", "I64", "BOOL"]


def test_headers_of_either_version(tmp_path: Path) -> None:
    array = np.arange(6.0)
    write_archive(tmp_path / "a.npz", {"one.npy": npy(array, (1, 0)), "two.npy": npy(array, (2, 0))})
    weights = open_weights(tmp_path / "a.npz")
    assert all(np.array_equal(weights.read(name).numpy(), array) for name in ("one", "two"))


@pytest.mark.parametrize("compressed", [False, True])
def test_memory(tmp_path: Path, compressed: bool) -> None:
    """Opening reads no numbers, rows no others, and an array is there once."""
    array = np.random.default_rng(0).integers(9, size=(64, MIB // 16), dtype=np.int32)
    (np.savez_compressed if compressed else np.savez)(tmp_path / "a.npz", a=array, b=array)
    size = array.nbytes
    assert size == 16 * MIB

    tracemalloc.start()
    weights = open_weights(tmp_path / "a.npz")
    opened = tracemalloc.get_traced_memory()[1]
    rows = weights.read_rows("b", 40, 44)
    of_rows = tracemalloc.get_traced_memory()[1]
    for name in ("a", "b"):
        whole = weights.read(name)
        del whole
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert torch.equal(rows, torch.from_numpy(array[40:44]))
    assert opened < MIB
    assert of_rows < 6 * MIB + size // 16
    assert size < peak < size + 6 * MIB


def test_tensors_outlive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, a=np.ones(4))
    value = open_weights(path).read("a")
    path.unlink()
    assert torch.equal(value, torch.ones(4, dtype=torch.float64))


def test_what_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, a=np.ones(3), b=np.array([{"run": print}], dtype=object))
    assert "b.npy holds Python objects, and reading such can run any code" in refusal(path)
    np.savez(path, names=np.array(["a", "b"]))
    assert "names.npy holds <U1; give it one of float16, float32" in refusal(path)
    np.savez(path, c=np.ones(3, np.complex64))
    assert "c.npy holds complex64; give it" in refusal(path)
    # bfloat16, as ml_dtypes has numpy write it.
    np.savez(path, brain=np.ones(3, "V2"))
    assert "brain.npy holds |V2; give it" in refusal(path)
    write_archive(path, {"a.npy": npy(np.ones(3)), "readme.txt": b"hello"})
    assert "readme.txt is no array" in refusal(path)
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a.npy", npy(np.ones(3)))
    assert "has a.npy more than once" in refusal(path)
    path.write_bytes(b"")
    assert "not a readable .npz file" in refusal(path)
    # An array that is no archive, and one of another kind.
    path.write_bytes(npy(np.ones(3)))
    assert "not a readable .npz file" in refusal(path)
    with pytest.raises(UserError, match=r"none\.npz: no such file"):
        open_weights(tmp_path / "none.npz")


def test_headers_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    honest = npy(np.ones((3, 4)))
    for shape, needs in (("(3, 5)", 120), ("(3, 3)", 72), ("(9999999, 9999999)", 8 * 9999999**2), ("(-3, -4)", 96)):
        lie = honest.replace(b"(3, 4), }" + b" " * (len(shape) - 6), b"%s, }" % shape.encode())
        assert len(lie) == len(honest)
        write_archive(path, {"a.npy": lie})
        assert f"a.npy has 96 bytes, its shape {shape} of float64 needs {needs}; the file is damaged" in refusal(path)
    for lie in (honest[:20], honest.replace(b"'shape'", b"'shaqe'"), honest.replace(b"(3, 4)", b"((((((")):
        write_archive(path, {"a.npy": lie})
        assert "a.npy is not readable" in refusal(path)
    write_archive(path, {"a.npy": honest[:6] + b"\x09\x00" + honest[8:]})
    assert "version (9, 0)" in refusal(path)


def test_damage_within_the_numbers_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    # So large that opening does not meet the damage.
    array = np.full((4, 3000), 1.25)
    np.savez(path, a=array)
    content = path.read_bytes()
    start = content.index(array.tobytes())
    path.write_bytes(content[: start + 70_000] + b"\x07" + content[start + 70_001 :])
    with pytest.raises(UserError, match=r"a\.npy is damaged \(Bad CRC-32"):
        open_weights(path).read("a")


@settings(max_examples=150)
@given(compressed=st.booleans(), data=st.data())
def test_bytes_of_any_kind_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, compressed: bool, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    (np.savez_compressed if compressed else np.savez)(path, a=np.ones((3, 2)), b=np.arange(5.0))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    try:
        weights = open_weights(path)
        for name in weights.names():
            assert tuple(weights.read(name).shape) == weights.shape(name)
            weights.read_rows(name, 0, 2)
    except UserError as error:
        assert str(path) in str(error)
