"""Compare finished runs: a table, and pictures of the scores, the allocation and the losses; report on saved scores:
where the most sensitive weights lie, by block and by operation; or on plans: what is trained, where and how."""

import importlib
from pathlib import Path

from _cli import describe, make_parser, run
from spt_dist import UserError
from spt_dist.report.patterns import parse_taus
from spt_dist.report.runs import report_on

EXAMPLE = """\
python launch/report.py work_dirs/digits_lora work_dirs/digits_spt_lora --out work_dirs/quickstart
  python launch/report.py scores/digits --out scores/digits_1000 --tau 1000
  python launch/report.py work_dirs/digits_spt_lora/plan.safetensors --out work_dirs/plan
  python launch/report.py scores/digits/plans/*.safetensors --out work_dirs/budgets"""


def main() -> None:
    parser = make_parser(__doc__, EXAMPLE)
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        type=Path,
        help="work dirs of launch/train.py; folders of scores from launch/sensitivity.py; plan files and task files "
        "(*.safetensors), and allocations that SPT's authors published (*.pth)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="folder for the tables and the pictures")
    parser.add_argument("--tau", action="append", metavar="N", help="which patterns, as in launch/sensitivity.py")
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="import this first: a module that registers kinds of one's own, as custom_imports does in a config",
    )
    arguments = parser.parse_args()
    for module in arguments.modules:
        _import(module)
    tables, files = report_on(arguments.paths, arguments.out, parse_taus(arguments.tau))
    print(tables)
    describe(files)


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"--import {name}: {error}; PYTHONPATH has to hold the folder of the module") from error


if __name__ == "__main__":
    run(main)
