"""What a finished run says about itself."""

import json
from pathlib import Path
from typing import Any

from spt_dist.errors import UserError
from spt_dist.report.plans import PLAN_ENDINGS

METHOD_LABELS = {
    "linear": "linear probe",
    "lora": "LoRA",
    "adapter": "adapter",
    "vpt": "VPT",
    "bias": "biases",
    "partial": "last blocks",
    "spt-lora": "SPT-LoRA",
    "spt-adapter": "SPT-Adapter",
    "spt-prompt": "SPT with prompts",
    "spt": "SPT",
    "full": "full fine-tuning",
}


def read_summary(work_dir: Path) -> dict[str, Any]:
    """What a finished run says about itself, see ``training.pipeline.RunResult``.

    Raises:
        UserError: there is none, or it can't be read.
    """
    path = work_dir / "summary.json"
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path}: no such file; {work_dir} holds no finished run of launch/train.py, and no scores, and is no plan "
            f"file (*{', *'.join(PLAN_ENDINGS)})"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not readable ({error})") from error
    return summary
