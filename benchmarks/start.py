"""How long a rank takes to start: our script and a run of one step beside what importing the libraries takes.

Everything is a process of its own, in turn, and its CPU time is taken: ranks of a node start at the same time.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from _record import record
from spt_dist.tables import format_table

ROOT = Path(__file__).resolve().parents[1]
BASE = "torch"
IMPORTS = {
    BASE: "import torch.distributed",
    "deepspeed": "import deepspeed",
    "mmsegmentation": "import spt_dist; import mmseg.apis",
    "transformers and peft": "import spt_dist; from transformers import Trainer; import peft",
    "spt_dist": "import spt_dist",
}
ONE_STEP = [
    "train.epochs=1",
    "train.warmup_epochs=0",
    "data.num_train=64",
    "data.num_val=64",
    "sensitivity.num_samples=64",
]


def find_commands(root: Path, folder: Path) -> dict[str, list[str]]:
    """What of a checkout is started: its training script's help, and a whole run of one step."""
    script = [str(root / "launch" / "train.py")]
    config = str(root / "configs" / "quickstart" / "digits_spt_lora.py")
    return {
        "train.py --help": [*script, "--help"],
        "train.py, one step": [*script, config, "--work-dir", str(folder), "--cfg-options", *ONE_STEP],
    }


def seconds_of(arguments: list[str], root: Path) -> float:
    """CPU seconds of a process of Python and its children, imports from ``root``."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *arguments], cwd=root, env=env, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example:\n  python benchmarks/start.py --before ../an-earlier-checkout",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--before", type=Path, help="root of another checkout, whose scripts are started in turn with ours"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the table, dated, to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        started = {f"import {name}": (["-c", code], ROOT) for name, code in IMPORTS.items()}
        roots = {"": ROOT} | ({", before": arguments.before.resolve()} if arguments.before else {})
        for suffix, root in roots.items():
            for name, command in find_commands(root, Path(folder, f"run{suffix}")).items():
                started[name + suffix] = (command, root)
        found: dict[str, list[float]] = {name: [] for name in started}
        # The first round fills caches, of files and of compiled modules.
        for _ in range(arguments.repeats + 1):
            for name, (command, root) in started.items():
                found[name].append(seconds_of(command, root))
    base = statistics.median(found[f"import {BASE}"][1:])
    rows = []
    for name, (_, *seconds) in found.items():
        median = statistics.median(seconds)
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        rows.append([name, f"{median:.2f}", spread, f"{median / base:.2f}"])
    title = f"CPU seconds, median and spread of {arguments.repeats}"
    record(format_table(title, ["what", "seconds", "spread", f"over import {BASE}"], rows), arguments.out)


if __name__ == "__main__":
    main()
