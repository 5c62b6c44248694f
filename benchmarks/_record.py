"""What a benchmark prints, kept with its date and the machine."""

import datetime
import platform
from pathlib import Path

import torch


def record(text: str, out: Path | None) -> None:
    """Print ``text``, and write it to ``out`` below a line with the date and one with the machine."""
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(f"{datetime.date.today()}\n{_machine()}\n\n{text}\n", encoding="utf-8")


def _machine() -> str:
    info = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    cores = f"{len(models)} x {models[0]}" if models else platform.processor()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cores}{gpu}, torch {torch.__version__}, Python {platform.python_version()}"
