"""Folders as Hugging Face's hub holds them: a merged model that timm loads by itself."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from spt_dist.allocation.plan import Plan
from spt_dist.errors import UserError
from spt_dist.files import save_tensors, write_text
from spt_dist.models.wrappers import unwrap
from spt_dist.tuning.export.cards import MeanStd, merged_card
from spt_dist.tuning.export.folder import EXPORT_KEY, open_folder
from spt_dist.tuning.inject import is_tuned
from spt_dist.tuning.merge import merge
from spt_dist.tuning.registry import is_mergeable

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


def save_pretrained(tuned: nn.Module, folder: str | Path, normalisation: MeanStd | None = None) -> Path:
    """Merge, and write a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads, with a card.

    The weights file is what ``launch/merge.py`` writes as well. An earlier export in the folder is replaced. With
    several ranks, call it on one.

    Args:
        tuned: a timm model from ``inject`` or ``load_delta``; stays as it is.
        folder: made if it does not exist.
        normalisation: mean and deviation of red, green and blue that the task's images have, where white is 1; timm
            then finds them in the folder. ``None`` leaves it timm's own of the architecture, of which the card warns.

    Returns:
        ``folder`` as a ``Path``.

    Raises:
        UserError: the model is not tuned; not all of it can be merged; timm would not build this architecture again
            (another head, arguments that JSON can't hold, no model of timm's); or the folder holds something else.
    """
    tuned = unwrap(tuned)
    if not is_tuned(tuned):
        raise UserError("save_pretrained: this model has no tuning modules; call inject or load_delta first")
    plan, fingerprint = tuned.spt_plan, tuned.spt_fingerprint
    assert isinstance(plan, Plan) and isinstance(fingerprint, str)
    staying = sorted({kind for kind in plan.matrices.values() if not is_mergeable(kind)})
    if staying:
        raise UserError(
            f"save_pretrained: this task has modules of kind {', '.join(staying)}, which can't be merged, and which "
            "timm can't build; share the task file (save_delta) instead"
        )
    architecture = (getattr(tuned, "pretrained_cfg", None) or {}).get("architecture")
    if architecture is None:
        raise UserError(
            f"save_pretrained: this {type(tuned).__name__} was not made by timm.create_model, so timm can't build it "
            "from a folder; save its state dict (launch/merge.py) instead"
        )
    merged = merge(tuned)
    config = _describe(merged)
    _check_rebuilds(merged, config)
    if normalisation is not None:
        mean, std = normalisation
        config["pretrained_cfg"] |= {"mean": list(mean), "std": list(std)}
    folder = open_folder(folder, "hf", WEIGHTS_FILE, CONFIG_FILE)
    metadata = {"kind": "merged", "model": architecture, EXPORT_KEY: "hf"}
    save_tensors(folder / WEIGHTS_FILE, merged.state_dict(), metadata)
    write_text(folder / "README.md", merged_card(merged, architecture, plan, fingerprint, normalisation))
    write_text(folder / CONFIG_FILE, json.dumps(config, indent=2))
    return folder


def _check_rebuilds(model: nn.Module, config: dict[str, Any]) -> None:
    """Refuse a model that timm would build differently from what the config says (a head put in by hand)."""
    import timm

    arguments = {**config.get("model_args", {}), "num_classes": config["num_classes"]}
    with torch.device("meta"):
        rebuilt = timm.create_model(config["architecture"], **arguments)
    shapes = [{name: tuple(value.shape) for name, value in each.state_dict().items()} for each in (model, rebuilt)]
    differing = [name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name)]
    if differing:
        name = differing[0]
        raise UserError(
            f"save_pretrained: {name} has shape {shapes[0].get(name, 'none')}, but timm would build this model with "
            f"{shapes[1].get(name, 'none')}; set heads with num_classes= or reset_classifier, or save the state dict "
            "(launch/merge.py)"
        )


def _describe(model: nn.Module) -> dict[str, Any]:
    """What is in ``config.json`` as timm writes it: architecture, the arguments it was built with, preprocessing."""
    # timm takes a second to import.
    from timm.models._hub import save_config_for_hf

    with TemporaryDirectory() as scratch:
        path = Path(scratch) / CONFIG_FILE
        try:
            save_config_for_hf(model, str(path))
        except ValueError as error:
            raise UserError(
                f"save_pretrained: {CONFIG_FILE} can't describe this model ({error}); build it with names in place of "
                "functions, as norm_layer='layernorm'"
            ) from error
        described: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return described
