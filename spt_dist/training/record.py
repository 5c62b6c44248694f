"""What a run was: the merged config, the versions and the code, for whoever finds the work dir later."""

import json
import logging
import platform
import shutil
import subprocess
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from spt_dist.errors import UserError
from spt_dist.files import write_text
from spt_dist.normalisation import Normalisation
from spt_dist.parallel.checkpoints import Checkpoint, drop_later
from spt_dist.sections import RunConfig

ARTEFACTS = (
    "run.json",
    "scores",
    "plan.safetensors",
    "metrics.jsonl",
    "speed.jsonl",
    "logs",
    "checkpoints",
    "task.safetensors",
    "task_best.safetensors",
    "summary.json",
    "merged.safetensors",
)
logger = logging.getLogger(__name__)
PACKAGES = ("spt_dist", "torch", "timm", "deepspeed", "mmengine", "numpy")


def put_aside(work_dir: Path) -> None:
    """Move what an earlier run left to ``previous/``: it must neither mix with the new run nor be lost. Collective.

    What was in ``previous/`` goes.
    """
    found = [work_dir / name for name in ARTEFACTS if (work_dir / name).exists()]
    if dist.get_rank() == 0 and found:
        previous = work_dir / "previous"
        shutil.rmtree(previous, ignore_errors=True)
        previous.mkdir()
        for path in found:
            path.rename(previous / path.name)
        logger.warning("%s held an earlier run; it is now in %s (--resume goes on instead)", work_dir, previous)
    dist.barrier()


def make_room(work_dir: Path, checkpoint: Checkpoint | None) -> None:
    """Let a work dir hold what belongs to this run and nothing else. Collective.

    A run that goes on from a checkpoint of this work dir drops what came after it there; any other puts all aside.

    Raises:
        UserError: the checkpoint lies in ``previous/``, which is about to be dropped.
    """
    own = work_dir / "checkpoints"
    if checkpoint is None or checkpoint.path.parent.resolve() != own.resolve():
        if checkpoint is not None and (work_dir / "previous").resolve() in checkpoint.path.resolve().parents:
            raise UserError(
                f"--resume {checkpoint.path}: move it out of {work_dir / 'previous'}, or give another work dir"
            )
        put_aside(work_dir)
        return
    if dist.get_rank() == 0:
        drop_later(own, checkpoint.progress.num_steps)
    dist.barrier()


def write_record(work_dir: Path, config: RunConfig, config_path: str, normalisation: Normalisation | None) -> None:
    """Write ``run.json``: the merged config, where it came from, versions, git commit and number of ranks.

    Args:
        work_dir: of the run.
        config: the merged config.
        config_path: the file it came from.
        normalisation: of images, as several keys of the config together say; ``None`` where the data have their own.
    """
    record = {
        "config_file": config_path,
        "config": asdict(config),
        "normalisation": None if normalisation is None else asdict(normalisation),
        "world_size": dist.get_world_size(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "git_commit": find_commit(Path(__file__).parent),
    }
    write_text(work_dir / "run.json", json.dumps(record, indent=1))


def find_commit(directory: Path) -> str | None:
    """The git commit of the checkout that holds ``directory``, ``+changes`` if it was changed; ``None`` outside one."""
    command = ["git", "-C", str(directory), "describe", "--always", "--abbrev=40", "--dirty=+changes", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def is_finished(config: RunConfig) -> bool:
    """Whether the work dir holds a finished run of exactly this config. Collective; rank 0 looks."""
    found = [False]
    if dist.get_rank() == 0:
        work_dir = Path(config.work_dir)
        found = [
            (work_dir / "summary.json").is_file() and read_recorded(work_dir) == json.loads(json.dumps(asdict(config)))
        ]
    dist.broadcast_object_list(found)
    return found[0]


def read_recorded(work_dir: Path) -> Any:
    """The merged config of the run in a work dir; ``None`` where that can't be read."""
    try:
        return json.loads((work_dir / "run.json").read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError):
        return None
