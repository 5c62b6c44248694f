"""Write a task file as a folder that other libraries load: a LoRA adapter for PEFT, or a merged model for timm."""

from _cli import add_config_options, describe, make_parser, read_config, run
from spt_dist import Plan, load_delta
from spt_dist.data.tasks import choose_normalisation
from spt_dist.training.scoring import build_model
from spt_dist.tuning.export.hub import save_pretrained
from spt_dist.tuning.export.peft import save_peft

EXAMPLE = (
    "python launch/export.py work_dirs/digits_spt_lora/task.safetensors "
    "--config configs/quickstart/digits_spt_lora.py --format hf --out exports/digits"
)


def main() -> None:
    parser = make_parser(__doc__, EXAMPLE)
    parser.add_argument("task", metavar="TASK", help="task file written by launch/train.py")
    add_config_options(parser, positional=False)
    parser.add_argument(
        "--format", required=True, choices=("peft", "hf"), help="peft: a LoRA adapter folder; hf: a merged timm model"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder; an earlier export in it is replaced")
    arguments = parser.parse_args()
    config = read_config(arguments)
    tuned = load_delta(build_model(config), arguments.task)
    if arguments.format == "hf":
        chosen = choose_normalisation(config.data, config.model.normalize)
        folder = save_pretrained(tuned, arguments.out, None if chosen is None else (chosen.mean, chosen.std))
        described = "timm's for the architecture" if chosen is None else str(chosen)
        describe({"timm folder": folder, "normalisation": described})
    else:
        plan = tuned.spt_plan
        assert isinstance(plan, Plan)
        described = f"{plan.num_structured:,} of {plan.num_trainable:,}, head not counted"
        describe({"PEFT folder": save_peft(tuned, arguments.out), "trained parameters for PEFT alone": described})


if __name__ == "__main__":
    run(main)
