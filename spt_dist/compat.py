"""Work-arounds for the libraries below us, each with its reason."""

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import torch

_TORCHVISION_OPS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_EXTENSION = "mmcv._ext"
# A Library un-registers its operators when it is collected, so it has to outlive the import of torchvision.
_torchvision_library: torch.library.Library | None = None


def declare_torchvision_ops() -> None:
    """Make ``import torchvision`` (hence timm) work beside a CPU build of torch.

    torchvision's wheel on PyPI is built for CUDA; with a CPU torch its extension does not load, and its
    registration of fake kernels for ``nms`` and ``qnms`` then fails at import. Declaring the two schemas is
    enough: calling the operators still raises torchvision's own clear error. No-op where the extension loads.
    """
    global _torchvision_library
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _torchvision_library is not None:
        return
    try:
        torch.ops.load_library(str(Path(spec.origin).with_name("_C.so")))
    except OSError:
        _torchvision_library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _TORCHVISION_OPS:
            _torchvision_library.define(schema)


class _MissingOperators(ModuleType):
    """Stands for mmcv's extension: has every operator, and each raises when it is called."""

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(name)

        def operator(*_: object, **__: object) -> NoReturn:
            raise NotImplementedError(
                f"mmcv's operator {name} is compiled code, which mmcv-lite lacks; install mmcv itself in its place"
            )

        return operator


def declare_mmcv_ops() -> None:
    """Make ``import mmseg.models`` work beside mmcv-lite, which has no compiled operators.

    Some of mmseg's heads import the operators whether they are used or not; SETR uses none. Imports nothing. No-op
    where mmcv is missing, or compiled for this Python.
    """
    spec = importlib.util.find_spec("mmcv")
    if spec is None or spec.submodule_search_locations is None or _EXTENSION in sys.modules:
        return
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    if any((folder / f"_ext{suffix}").is_file() for folder in folders for suffix in EXTENSION_SUFFIXES):
        return
    extension = _MissingOperators(_EXTENSION)
    # mmcv asks pkgutil whether it has operators: a missing spec is an error there, one without a loader means no.
    extension.__spec__ = ModuleSpec(_EXTENSION, None)
    sys.modules[_EXTENSION] = extension


def import_mmengine() -> None:
    """Import mmengine's parts for training, but not transformers with them.

    They register an optimizer of transformers, which nothing here uses and whose import takes longer than all else of
    mmengine (1.7 against 0.35 s for every rank). No-op where they, or transformers, are imported already.
    """
    if "mmengine.optim" in sys.modules or "transformers" in sys.modules:
        return
    sys.modules["transformers"] = None  # type: ignore[assignment]  # Python's way to say that there is none
    try:
        importlib.import_module("mmengine.optim")
    finally:
        del sys.modules["transformers"]


def start_deepspeed() -> None:
    """Let DeepSpeed find the process group, without compiling C++ on machines without an accelerator.

    ``deepspeed.init_distributed`` builds a shared-memory all-reduce on every CPU run: 38 s the first time, and a
    crash where ninja or g++ are missing. Gloo does the job.
    """
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
