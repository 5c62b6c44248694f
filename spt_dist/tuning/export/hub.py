"""Folders as Hugging Face's hub holds them: a merged model that timm loads by itself."""

from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from spt_dist.allocation.plan import Plan
from spt_dist.errors import UserError
from spt_dist.files import save_tensors, write_text
from spt_dist.tuning.export.cards import merged_card
from spt_dist.tuning.export.folder import EXPORT_KEY, open_folder
from spt_dist.tuning.inject import is_tuned

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


def save_pretrained(merged: nn.Module, folder: str | Path, tuned: nn.Module) -> Path:
    """Write a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads, with a model card.

    The weights file is what ``launch/merge.py`` writes as well. An earlier export in the folder is replaced. With
    several ranks, call it on one.

    Args:
        merged: a plain timm model from ``merge``, made by ``timm.create_model``.
        folder: made if it does not exist.
        tuned: what it was merged from; the card tells its plan and its backbone's fingerprint.

    Returns:
        ``folder`` as a ``Path``.

    Raises:
        UserError: the merged model has tuning modules, is none of timm's, or was built with arguments that JSON can't
            hold; or the folder holds something else.
    """
    if is_tuned(merged):
        raise UserError(
            "save_pretrained: this model has tuning modules, which timm can't build; merge it first, or share the task "
            "file (save_delta) if adapters or prompts are left after merging"
        )
    if not is_tuned(tuned):
        raise UserError("save_pretrained: tuned has no plan; give the model that was merged, from inject or load_delta")
    architecture = (getattr(merged, "pretrained_cfg", None) or {}).get("architecture")
    if architecture is None:
        raise UserError(
            f"save_pretrained: this {type(merged).__name__} was not made by timm.create_model, so timm can't build it "
            "from a folder; save its state dict (launch/merge.py) instead"
        )
    plan, fingerprint = tuned.spt_plan, tuned.spt_fingerprint
    assert isinstance(plan, Plan) and isinstance(fingerprint, str)
    config = _describe(merged)
    folder = open_folder(folder, "hf", WEIGHTS_FILE, CONFIG_FILE)
    metadata = {"kind": "merged", "model": architecture, EXPORT_KEY: "hf"}
    save_tensors(folder / WEIGHTS_FILE, merged.state_dict(), metadata)
    write_text(folder / "README.md", merged_card(merged, architecture, plan, fingerprint))
    write_text(folder / CONFIG_FILE, config)
    return folder


def _describe(model: nn.Module) -> str:
    """``config.json`` as timm writes it: architecture, the arguments it was built with, preprocessing."""
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
        return path.read_text(encoding="utf-8")
