"""Compare finished runs: a table, and pictures of the scores, the allocation and the losses; or report on saved scores:
where the most sensitive weights lie, by block and by operation."""

from pathlib import Path

from _cli import describe, make_parser, run
from spt_dist.report.patterns import parse_taus
from spt_dist.report.runs import compare_runs

EXAMPLE = """\
python launch/report.py work_dirs/digits_lora work_dirs/digits_spt_lora --out work_dirs/quickstart
  python launch/report.py scores/digits --out scores/digits_1000 --tau 1000"""


def main() -> None:
    parser = make_parser(__doc__, EXAMPLE)
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="DIR",
        type=Path,
        help="work dirs of launch/train.py, or folders of scores from launch/sensitivity.py",
    )
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="folder for the tables and the pictures")
    parser.add_argument("--tau", action="append", metavar="N", help="which patterns, as in launch/sensitivity.py")
    arguments = parser.parse_args()
    tables, files = compare_runs(arguments.folders, arguments.out, parse_taus(arguments.tau))
    print(tables)
    describe(files)


if __name__ == "__main__":
    run(main)
