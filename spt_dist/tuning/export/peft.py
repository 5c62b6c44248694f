"""Hugging Face PEFT folders: the low-rank modules of a tuned model as a LoRA adapter, and the rest beside it.

PEFT knows one pair of matrices a layer, ``W + (alpha / rank) B A``. So the modules on parts of a fused layer become
one pair: A stacks their ``down``, B holds their ``up`` as blocks, each in its own rows and columns; alpha is the rank.
For a pointwise convolution both are 1 x 1 kernels. On a depthwise one PEFT's pair is another thing than ours.

Shape suffixes: I in_features, O out_features, S sum of the ranks of a layer's modules.
"""

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from spt_dist.allocation.plan import Plan
from spt_dist.errors import UserError
from spt_dist.files import load_tensors, save_tensors, write_text
from spt_dist.models.matrices import own_name_of, parent_of
from spt_dist.models.wrappers import unwrap
from spt_dist.tuning.convolutions import TunedConv2d
from spt_dist.tuning.delta import attach_delta, describe_delta, parse_delta, trained_values
from spt_dist.tuning.export.cards import peft_card
from spt_dist.tuning.export.folder import EXPORT_KEY, open_folder
from spt_dist.tuning.inject import is_tuned
from spt_dist.tuning.lora import LowRank
from spt_dist.tuning.tuned import TunedLayer

FORMAT_VERSION = 1
CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
REST_FILE = "spt_rest.safetensors"
_PEFT_PREFIX = "base_model.model."
# What decides how strongly PEFT applies the matrices: a change of these is not seen in the matrices themselves.
_SCALE_KEYS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")


@dataclass(frozen=True)
class _Part:
    """One low-rank module's place in the stack of its layer.

    Attributes:
        name: of the module in the model.
        rows: first row of the layer's weight that it updates, and the one after the last.
        columns: likewise in the stack of ranks: columns of B, rows of A.
    """

    name: str
    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def block(self) -> tuple[slice, slice]:
        """The part of B that is the module's own."""
        return slice(*self.rows), slice(*self.columns)


def save_peft(tuned: nn.Module, folder: str | Path, base_model: str | None = None) -> Path:
    """Write a folder that ``peft.PeftModel.from_pretrained(backbone, folder)`` loads, and ``load_peft`` in full.

    PEFT gets the low-rank modules and the head; single weights, whole vectors and tokens can't be LoRA and go to
    ``spt_rest.safetensors``, with the plan and the backbone's fingerprint. An earlier export in the folder is replaced.
    With several ranks, call it on one; the parameters have to be whole (they are under DDP and ZeRO 0 to 2).

    Args:
        tuned: from ``inject`` or ``load_delta``.
        folder: made if it does not exist.
        base_model: what the folder shall call the backbone; ``None`` for its architecture and the first digits of its
            fingerprint.

    Returns:
        ``folder`` as a ``Path``.

    Raises:
        UserError: the model is not tuned; its plan has no low-rank module, or modules that PEFT has no type for (also
            low-rank ones on depthwise convolutions); or the folder holds something else.
    """
    tuned = unwrap(tuned)
    if not is_tuned(tuned):
        raise UserError("save_peft: this model has no tuning modules; call inject or load_delta first")
    plan = tuned.spt_plan
    assert isinstance(plan, Plan)
    _refuse_other_plans(plan)
    state = trained_values(tuned)
    stacks = _find_stacks(tuned)
    adapter = {_PEFT_PREFIX + name: state.pop(name) for name in plan.head}
    for layer, parts in stacks.items():
        adapter[_key(layer, "A")], adapter[_key(layer, "B")] = _stack(parts, state, tuned.get_submodule(layer))
    tensors, delta = describe_delta(tuned, state)
    base_model = base_model or f"{delta['backbone']}@{delta['fingerprint'][:12]}"
    config = _peft_config(stacks, plan, base_model)
    metadata = {
        "kind": "peft_rest",
        "version": FORMAT_VERSION,
        EXPORT_KEY: "peft",
        "delta": delta,
        "scales": {key: config[key] for key in _SCALE_KEYS},
        "stacks": {layer: [asdict(part) for part in parts] for layer, parts in stacks.items()},
    }
    folder = open_folder(folder, "peft", REST_FILE, CONFIG_FILE)
    save_tensors(folder / REST_FILE, tensors, metadata)
    save_tensors(folder / ADAPTER_FILE, adapter, {"kind": "peft_adapter"})
    write_text(folder / "README.md", peft_card(tuned, plan, delta["fingerprint"], base_model))
    write_text(folder / CONFIG_FILE, json.dumps(config, indent=2))
    return folder


def load_peft(backbone: nn.Module, folder: str | Path) -> nn.Module:
    """Inject what ``save_peft`` wrote into the backbone it was made for, in place: plan and values, bit for bit.

    The low-rank modules and the head come from ``adapter_model.safetensors``, also where PEFT has trained them since.
    The head is replaced by the task's where the number of classes differs (timm models).

    Returns:
        ``backbone``, tuned.

    Raises:
        UserError: a file is missing, damaged or does not fit the others; training with PEFT has put values where the
            plan has none; or the backbone is another one. The backbone is unchanged then.
    """
    folder = Path(folder)
    if not (folder / REST_FILE).is_file():
        raise UserError(f"{folder}: has no {REST_FILE}, so save_peft did not write it; load it with peft instead")
    tensors, metadata = load_tensors(folder / REST_FILE, "peft_rest")
    if metadata.get("version") != FORMAT_VERSION:
        raise UserError(
            f"{folder / REST_FILE}: of version {metadata.get('version')}, this spt_dist reads {FORMAT_VERSION}"
        )
    _check_scales(folder / CONFIG_FILE, metadata["scales"])
    adapter = _Adapter(folder / ADAPTER_FILE)
    state = {name: adapter.take(_PEFT_PREFIX + name) for name in metadata["delta"]["plan"]["head"]}
    for layer, found in metadata["stacks"].items():
        state |= _unstack(layer, [_Part(**part) for part in found], adapter)
    adapter.check_empty()
    task = parse_delta(tensors, metadata["delta"], folder)
    task = replace(task, state=task.state | state)
    task.check_backbone(backbone)
    return attach_delta(backbone, task)


def _refuse_other_plans(plan: Plan) -> None:
    others = {name: kind for name, kind in plan.matrices.items() if kind != "lora"}
    if others:
        name, kind = next(iter(others.items()))
        raise UserError(
            f"save_peft: {name} has a module of kind {kind!r}, which PEFT has no type for ({len(others)} such); share "
            "the task file (save_delta) instead"
        )
    if not plan.matrices:
        raise UserError(
            f"save_peft: the plan ({plan.method}) has no LoRA module, so PEFT has nothing to load; export the merged "
            "model (save_pretrained, or launch/export.py --format hf) or share the task file (save_delta)"
        )


def _find_stacks(tuned: nn.Module) -> dict[str, list[_Part]]:
    """Name of each layer with low-rank modules -> its modules by their rows."""
    stacks: dict[str, list[_Part]] = {}
    for layer_name, layer in tuned.named_modules():
        if isinstance(layer, TunedConv2d) and layer.is_depthwise and layer.structured:
            raise UserError(
                f"save_peft: {layer_name} is a depthwise convolution with a low-rank module, and PEFT's convolutions "
                "share their first factor over all channels of a group; export the merged model (save_pretrained, or "
                "launch/export.py --format hf) or share the task file (save_delta)"
            )
        if isinstance(layer, TunedLayer):
            parts: list[_Part] = []
            for own_name, rows, rank in sorted(_low_rank_modules(layer), key=lambda found: found[1].start):
                column = parts[-1].columns[1] if parts else 0
                parts.append(_Part(f"{layer_name}.{own_name}", (rows.start, rows.stop), (column, column + rank)))
            if parts:
                stacks[layer_name] = parts
    return stacks


def _low_rank_modules(layer: TunedLayer) -> list[tuple[str, slice, int]]:
    """Own name, rows of the layer's weight and rank of its low-rank modules."""
    return [
        (name, layer.row_ranges[own_name_of(name)], len(module.down))
        for name, module in layer.named_modules()
        if isinstance(module, LowRank)
    ]


def _stack(parts: list[_Part], state: dict[str, Tensor], layer: nn.Module) -> tuple[Tensor, Tensor]:
    """A ``(S, I)`` and B ``(O, S)`` of a layer; takes its modules' values out of ``state``.

    They have the layer's further axes, of size 1, too.
    """
    weight = layer.get_parameter("weight")
    a_SI = torch.cat([state.pop(f"{part.name}.down").detach() for part in parts])
    b_OS = a_SI.new_zeros(len(weight), len(a_SI))
    for part in parts:
        b_OS[part.block] = state.pop(f"{part.name}.up").detach()
    further = weight.shape[2:]
    return a_SI.view(*a_SI.shape, *further), b_OS.view(*b_OS.shape, *further)


def _unstack(layer: str, parts: list[_Part], adapter: "_Adapter") -> dict[str, Tensor]:
    """The values of a layer's modules, by their names in the model."""
    a_SI, b_OS = adapter.take(_key(layer, "A")), adapter.take(_key(layer, "B"))
    rank = parts[-1].columns[1]
    is_plain = all(len(x.shape) > 1 and set(x.shape[2:]) <= {1} for x in (a_SI, b_OS))
    if not is_plain or len(a_SI) != rank or b_OS.shape[1] != rank:
        raise UserError(
            f"{adapter.path}: {layer} has matrices of shape {tuple(a_SI.shape)} and {tuple(b_OS.shape)}, exported with "
            f"rank {rank}; save_peft writes such a folder anew"
        )
    a_SI, b_OS = a_SI.flatten(1), b_OS.flatten(1)
    outside_OS = b_OS.clone()
    for part in parts:
        outside_OS[part.block] = 0
    if outside_OS.any():
        raise UserError(
            f"{adapter.path}: {layer}.lora_B has {int(outside_OS.count_nonzero()):,} values outside the blocks of "
            f"{', '.join(own_name_of(part.name) for part in parts)}, so it was trained as one; merge it with peft "
            "(merge_and_unload), or keep them zero in training"
        )
    values = {f"{part.name}.down": a_SI[slice(*part.columns)] for part in parts}
    return values | {f"{part.name}.up": b_OS[part.block] for part in parts}


class _Adapter:
    """The tensors of an adapter file, to be taken out one by one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise UserError(f"{path}: no such file; the export is not complete, save_peft writes it anew")
        try:
            self.tensors = load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path}: not a readable safetensors file ({error}); it may be truncated") from error

    def take(self, key: str) -> Tensor:
        """The tensor ``key``, which has to be there."""
        if key not in self.tensors:
            raise UserError(f"{self.path}: has no {key}, which the exported task has; it may belong to another folder")
        return self.tensors.pop(key)

    def check_empty(self) -> None:
        """Refuse what is left."""
        if self.tensors:
            raise UserError(
                f"{self.path}: holds {min(self.tensors)}, which the exported task has not ({len(self.tensors)} such "
                "tensors); load it with peft instead"
            )


def _key(layer: str, matrix: str) -> str:
    return f"{_PEFT_PREFIX}{layer}.lora_{matrix}.weight"


def _peft_config(stacks: dict[str, list[_Part]], plan: Plan, base_model: str) -> dict[str, Any]:
    """``adapter_config.json``: alpha equals the rank everywhere, so that PEFT's scale is 1."""
    ranks = {layer: parts[-1].columns[1] for layer, parts in stacks.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # Both are regular expressions. PEFT matches the first as a whole, but these at the end of a name: hence the ^.
    targets = "|".join(re.escape(layer) for layer in ranks)
    unusual = {f"^{re.escape(layer)}": rank for layer, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "target_modules": targets,
        "modules_to_save": sorted({parent_of(name) for name in plan.head}) or None,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": unusual,
        "alpha_pattern": unusual,
        "use_rslora": False,
        "lora_dropout": plan.modules.dropout,
        "bias": "none",
    }


def _check_scales(path: Path, wanted: dict[str, Any]) -> None:
    """Refuse a config that makes PEFT scale the matrices in another way than the exported task."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; the export is not complete, save_peft writes it anew")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from error
    for key, value in wanted.items():
        found = config.get(key) if isinstance(config, dict) else None
        if found != value:
            raise UserError(f"{path}: {key} is {found!r}, exported as {value!r}; give it this value again")
