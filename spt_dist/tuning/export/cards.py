"""Model cards: the README.md of an exported folder, Markdown with the front matter that Hugging Face's hub reads."""

from collections.abc import Sequence
from importlib.metadata import version
from textwrap import fill

from torch import nn

from spt_dist.allocation.plan import Plan
from spt_dist.models.projections import has_switches

_SWITCHES = """\
for module in backbone.modules():
    # timm reads the weight of its layer qkv past PEFT's modules otherwise.
    if hasattr(module, "qkv_bias_separate"):
        module.qkv_bias_separate = True
"""
# Mean and deviation of red, green and blue, where white is 1.
MeanStd = tuple[Sequence[float], Sequence[float]]


def peft_card(tuned: nn.Module, plan: Plan, fingerprint: str, base_model: str) -> str:
    """The card of a PEFT folder.

    Args:
        tuned: the model whose task is in the folder.
        plan: its plan.
        fingerprint: of its backbone, 64 hexadecimal digits.
        base_model: what the folder calls the backbone.
    """
    rest = plan.num_trainable - plan.num_structured
    if rest:
        alone = (
            f"It then applies the head and the low-rank modules: {plan.num_structured:,} of {plan.num_trainable:,} "
            f"trained parameters (head not counted). The other {rest:,} (single weights, vectors, tokens) have no "
            "place in PEFT's format and are in `spt_rest.safetensors`; without them the model is another one than was "
            "trained."
        )
    else:
        alone = f"It then applies everything that was trained: the head and {plan.num_structured:,} parameters."
    return f"""\
---
library_name: peft
tags: [lora, timm, spt_dist]
---

# LoRA adapter for {base_model}

A task learned with spt_dist. The folder holds no backbone: it belongs to the weights whose
`spt_dist.models.fingerprint.fingerprint` is given below.

## With PEFT alone

```python
import timm
from peft import PeftModel

{_build_line(tuned)}
...  # load the weights of the backbone
{_SWITCHES if has_switches(tuned) else ""}model = PeftModel.from_pretrained(backbone, "FOLDER").eval()
```

{fill(alone, 120)}

Needs PEFT 0.15 or later. The query, key and value projections had modules of their own, which are blocks of one pair of
matrices here; PEFT trains the pair as one, and what fills the zeros between the blocks can't go back to spt_dist.

## With spt_dist

```python
import spt_dist

model = spt_dist.load_peft(backbone, "FOLDER").eval()
```

All of the task, bit for bit; another backbone is refused.

{_plan_section(plan, _count_head(tuned, plan), fingerprint)}
{_version_section()}"""


def merged_card(
    merged: nn.Module, architecture: str, plan: Plan, fingerprint: str, normalisation: MeanStd | None
) -> str:
    """The card of a folder with a merged model.

    Args:
        merged: the model in the folder.
        architecture: timm's name of it.
        plan: what was trained.
        fingerprint: of the backbone before that, 64 hexadecimal digits.
        normalisation: of the task's images; ``None`` where it is not known.
    """
    if normalisation is None:
        known = (
            "`config.json` has timm's preprocessing for this architecture (size, mean, deviation, crop), which may not "
            "be the task's."
        )
    else:
        mean, std = (" ".join(f"{value:.6g}" for value in values) for values in normalisation)
        known = (
            f"`config.json` has the mean ({mean}) and the deviation ({std}) that the task was trained with, where "
            "white is 1. Size, crop and interpolation are timm's for this architecture and may not be the task's."
        )
    return f"""\
---
library_name: timm
pipeline_tag: image-classification
tags: [image-classification, timm, spt_dist]
---

# {architecture}, fine-tuned with spt_dist

Everything that was trained is merged into the weights: this is a plain timm model.

```python
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
```

{fill(known, 120)}

{_plan_section(plan, _count_head(merged, plan), fingerprint)}
{_version_section()}"""


def _build_line(model: nn.Module) -> str:
    """Python code that builds the model's architecture, where timm has built it."""
    from timm.models import get_model_args

    config = getattr(model, "pretrained_cfg", None) or {}
    if "architecture" not in config:
        return f"backbone = ...  # a {type(model).__name__}"
    arguments = [repr(config["architecture"]), *(f"{key}={value!r}" for key, value in get_model_args(model).items())]
    return f"backbone = timm.create_model({', '.join(arguments)})"


def _plan_section(plan: Plan, num_head: int, fingerprint: str) -> str:
    share = f" ({plan.num_trainable / plan.backbone_size:.3%} of the backbone)" if plan.backbone_size else ""
    return f"""\
## What was trained

| | |
|---|---|
| method | {plan.method} |
| trained parameters, head not counted | {plan.num_trainable:,}{share} |
| parameters of the head | {num_head:,} |
| fingerprint of the backbone | `{fingerprint}` |

```
{plan.summary()}
```
"""


def _version_section() -> str:
    return "## Versions\n\n" + "".join(f"- {name} {version(name)}\n" for name in ("spt_dist", "torch", "timm"))


def _count_head(model: nn.Module, plan: Plan) -> int:
    return sum(model.get_parameter(name).numel() for name in plan.head)
