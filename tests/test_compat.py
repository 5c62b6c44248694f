"""Work-arounds for the libraries below us."""

import importlib.util
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from spt_dist.compat import declare_mmcv_ops

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("extension", "is_declared"),
    [(None, True), ("_ext.other-python.so", True), (f"_ext{EXTENSION_SUFFIXES[0]}", False)],
)
def test_only_missing_operators_are_declared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extension: str | None, is_declared: bool
) -> None:
    (tmp_path / "mmcv").mkdir()
    (tmp_path / "mmcv" / "__init__.py").write_text("raise RuntimeError('imported')")
    if extension is not None:
        (tmp_path / "mmcv" / extension).write_bytes(b"compiled")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("mmcv", "mmcv._ext"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    declare_mmcv_ops()
    assert ("mmcv._ext" in sys.modules) == is_declared
    monkeypatch.delitem(sys.modules, "mmcv._ext", raising=False)


def test_nothing_is_declared_without_mmcv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    for name in ("mmcv", "mmcv._ext"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    declare_mmcv_ops()
    assert "mmcv._ext" not in sys.modules


_SEGMENTATION = """
import sys, spt_dist
def tell(value): print(">", value)
tell(any(name.startswith(("mmcv.", "mmseg")) and name != "mmcv._ext" for name in sys.modules))
import mmseg.models
from mmcv.ops import sigmoid_focal_loss, point_sample
from mmcv.utils.ext_loader import check_ops_exist
from mmseg.registry import MODELS
import torch
tell(check_ops_exist())
norm = dict(type="BN")
head = dict(type="SETRUPHead", in_channels=8, channels=8, num_classes=3, in_index=0, num_convs=1, norm_cfg=norm)
backbone = dict(type="VisionTransformer", img_size=32, embed_dims=8, num_layers=1, num_heads=2)
model = MODELS.build(dict(type="EncoderDecoder", backbone=backbone, decode_head=head, test_cfg=dict(mode="whole")))
tell(tuple(model(torch.zeros(1, 3, 32, 32)).shape))
try:
    sigmoid_focal_loss(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), 2.0, 0.25, None, "none")
except NotImplementedError as error:
    tell(error)
"""


@pytest.mark.segmentation
def test_setr_runs_beside_mmcv_lite() -> None:
    spec = importlib.util.find_spec("mmcv")
    if spec is None or spec.origin is None or list(Path(spec.origin).parent.glob("_ext.*")):
        pytest.skip("needs mmcv-lite")
    program = [sys.executable, "-c", _SEGMENTATION]
    result = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("> ")]
    imported, has_operators, shape, message = (line.removeprefix("> ") for line in lines)
    assert (imported, has_operators, shape) == ("False", "False", "(1, 3, 8, 8)")
    assert "sigmoid_focal_loss_forward" in message and "install mmcv itself" in message


_START_OF_A_RUN = """
import sys
from spt_dist.sections import LogConfig
from spt_dist.training.curves import check_backends
import spt_dist.training.pipeline
check_backends(LogConfig())
print(">", sorted({"sklearn", "scipy", "skimage", "matplotlib", "transformers", "peft", "mmseg"} & set(sys.modules)))
import transformers
print(">", transformers.Adafactor.__name__)
"""


def test_what_a_rank_does_without_at_its_start() -> None:
    """Each of these takes a good part of a second or more of every rank of every run."""
    program = [sys.executable, "-c", _START_OF_A_RUN]
    result = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["> []", "> Adafactor"]


def test_mmengine_finds_transformers_where_it_was_imported_before() -> None:
    lines = ["import transformers", "from spt_dist.compat import import_mmengine", "import_mmengine()"]
    lines += ["from mmengine.registry import OPTIMIZERS", "import mmengine.optim", "print('Adafactor' in OPTIMIZERS)"]
    program = [sys.executable, "-c", "\n".join(lines)]
    result = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "True", result.stderr
