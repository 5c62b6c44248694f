"""Compare finished runs: a table, and pictures of the scores, the allocation and the losses."""

from pathlib import Path

from _cli import describe, make_parser, run
from spt_dist.report.runs import compare_runs

EXAMPLE = "python launch/report.py work_dirs/digits_lora work_dirs/digits_spt_lora --out work_dirs/quickstart"


def main() -> None:
    parser = make_parser(__doc__, EXAMPLE)
    parser.add_argument("work_dirs", nargs="+", metavar="WORK_DIR", type=Path, help="work dirs of launch/train.py")
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="folder for the table and the pictures")
    arguments = parser.parse_args()
    table, files = compare_runs(arguments.work_dirs, arguments.out)
    print(table)
    describe(files)


if __name__ == "__main__":
    run(main)
