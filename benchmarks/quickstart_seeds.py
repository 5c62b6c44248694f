"""The quickstart's methods over several seeds: mean and spread of the held-out accuracy.

Runs ``launch/train.py`` once for each method and seed, several at a time, and prints one table.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from spt_dist.files import write_text
from spt_dist.tables import format_table

ROOT = Path(__file__).parent.parent
METHODS = ("digits_linear", "digits_lora", "digits_spt_lora", "digits_full")


def train(method: str, seed: int, work_dir: Path, options: list[str]) -> dict[str, Any]:
    """Run one method with one seed on one thread; returns the run's summary."""
    run_dir = work_dir / f"{method}_seed{seed}"
    command = [sys.executable, str(ROOT / "launch" / "train.py"), str(ROOT / "configs" / "quickstart" / f"{method}.py")]
    command += ["--work-dir", str(run_dir), "--cfg-options", f"seed={seed}", *options]
    # Several runs side by side: each on one core, or they hinder each other.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    print(f"{method} seed {seed}: {summary['scores']['top1']:.2%}", flush=True)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example:\n  python benchmarks/quickstart_seeds.py --seeds 3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0 on")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/quickstart_seeds"))
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="for every run")
    arguments = parser.parse_args()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        pending = {
            method: [
                pool.submit(train, method, seed, arguments.work_dir, arguments.cfg_options)
                for seed in range(arguments.seeds)
            ]
            for method in arguments.methods
        }
        results = {method: [run.result() for run in runs] for method, runs in pending.items()}
    rows = []
    for method, summaries in results.items():
        tops = [100 * summary["scores"]["top1"] for summary in summaries]
        spread = f"{statistics.stdev(tops):.2f}" if len(tops) > 1 else "-"
        trained = sorted({summary["num_trainable"] for summary in summaries})
        counts = f"{trained[0]:,}" if len(trained) == 1 else f"{trained[0]:,} to {trained[-1]:,}"
        rows.append([method, counts, f"{statistics.mean(tops):.2f}", spread, " ".join(f"{top:.2f}" for top in tops)])
    columns = ["method", "trainable", "mean top-1 %", "deviation", "each seed"]
    table = format_table(f"held-out accuracy over {arguments.seeds} seeds", columns, rows)
    print(table)
    write_text(arguments.work_dir / "table.txt", table + "\n")


if __name__ == "__main__":
    main()
