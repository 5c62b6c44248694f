"""Compare finished runs: a table, and pictures of the scores, the allocation and the losses; report on saved scores:
where the most sensitive weights lie, by block and by operation; or on plans: what is trained, where and how. Or tell
what the parts of a model are for SPT, and what it leaves out."""

import importlib
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from _cli import describe, make_parser, run
from spt_dist import UserError
from spt_dist.config import check_arguments, read_values
from spt_dist.models.classifier import create_model
from spt_dist.report.patterns import parse_taus
from spt_dist.report.runs import report_on
from spt_dist.sections import ModelConfig
from spt_dist.sensitivity.coverage import describe_coverage, find_image_shape

EXAMPLE = """\
python launch/report.py work_dirs/digits_lora work_dirs/digits_spt_lora --out work_dirs/quickstart
  python launch/report.py scores/digits --out scores/digits_1000 --tau 1000
  python launch/report.py work_dirs/digits_spt_lora/plan.safetensors --out work_dirs/plan
  python launch/report.py scores/digits/plans/*.safetensors --out work_dirs/budgets
  python launch/report.py --inventory convnext_base"""
NUM_CLASSES = 1000


def main() -> None:
    parser = make_parser(__doc__, EXAMPLE)
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        type=Path,
        help="work dirs of launch/train.py; folders of scores from launch/sensitivity.py; plan files and task files "
        "(*.safetensors), and allocations that SPT's authors published (*.pth)",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder for the tables and the pictures")
    parser.add_argument("--tau", action="append", metavar="N", help="which patterns, as in launch/sensitivity.py")
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="import this first: a module that registers kinds of one's own, as custom_imports does in a config",
    )
    parser.add_argument(
        "--inventory",
        metavar="MODEL",
        help="instead of all this: what there is to score and to tune in a model, and what is left out; a name of "
        "timm's or a config file (.py), of which the section `model` is enough",
    )
    arguments = parser.parse_args()
    for module in arguments.modules:
        _import(module)
    if arguments.inventory is not None:
        _refuse_beside_inventory(arguments)
        print(_take_inventory(arguments.inventory))
        return
    if not arguments.paths or arguments.out is None:
        parser.error("PATH and --out are required, or --inventory alone")
    tables, files = report_on(arguments.paths, arguments.out, parse_taus(arguments.tau))
    print(tables)
    describe(files)


def _refuse_beside_inventory(arguments: Namespace) -> None:
    given = {"PATH": arguments.paths, "--out": arguments.out, "--tau": arguments.tau}
    for option, value in given.items():
        if value:
            raise UserError(
                f"--inventory {arguments.inventory}: prints a table and reads no results; leave {option} out"
            )


def _take_inventory(wanted: str) -> str:
    config = _read_model(Path(wanted)) if wanted.endswith(".py") else ModelConfig(name=wanted, num_classes=NUM_CLASSES)
    model = create_model(config.name, config.num_classes, config.kwargs, torch.device("meta"))
    return f"{config.name}\n{describe_coverage(model, find_image_shape(model, config.kwargs))}"


def _read_model(path: Path) -> ModelConfig:
    """The section ``model`` of a config, whatever else is there. Configs of backbones do not say how many classes."""
    section = read_values(path).get("model")
    if not isinstance(section, dict):
        raise UserError(f"{path}: has no section model=dict(...), which is what an inventory is taken of")
    values: dict[str, Any] = {"num_classes": NUM_CLASSES} | section
    check_arguments(ModelConfig, values, "model")
    return ModelConfig(**values)


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"--import {name}: {error}; PYTHONPATH has to hold the folder of the module") from error


if __name__ == "__main__":
    run(main)
