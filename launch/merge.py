"""Fold a task file into its backbone: a plain timm checkpoint at no extra inference cost."""

from _cli import add_config_options, describe, make_parser, read_config, run
from spt_dist import UserError, load_delta, merge
from spt_dist.files import save_tensors
from spt_dist.training.scoring import build_model
from spt_dist.tuning.inject import is_tuned

EXAMPLE = (
    "python launch/merge.py work_dirs/digits_spt_lora/task.safetensors "
    "--config configs/quickstart/digits_spt_lora.py --out merged.safetensors"
)


def main() -> None:
    parser = make_parser(__doc__, EXAMPLE)
    parser.add_argument("task", metavar="TASK", help="task file written by launch/train.py")
    add_config_options(parser, positional=False)
    parser.add_argument("--out", required=True, metavar="FILE", help="the merged state dict, safetensors")
    arguments = parser.parse_args()
    config = read_config(arguments)
    merged = merge(load_delta(build_model(config), arguments.task))
    if is_tuned(merged):
        raise UserError(
            f"{arguments.task}: not all of it can be merged into a plain checkpoint; go on with the task file"
        )
    path = save_tensors(arguments.out, merged.state_dict(), {"kind": "merged", "model": config.model.name})
    describe({"merged checkpoint": path, "parameters": f"{sum(p.numel() for p in merged.parameters()):,}"})


if __name__ == "__main__":
    run(main)
