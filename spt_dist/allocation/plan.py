"""The plan: who is tuned, and how. A file of its own, readable without the model."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spt_dist.allocation.kinds import PRESETS, ModuleOptions, structured_cost
from spt_dist.allocation.published import read_allocation
from spt_dist.errors import UserError
from spt_dist.files import load_tensors, save_tensors
from spt_dist.models.matrices import operation_of
from spt_dist.tables import format_table

FORMAT_VERSION = 2
# Version 1 knew LoRA only and had no `modules`.
READABLE_VERSIONS = (1, FORMAT_VERSION)
_SPARSE_PREFIX = "sparse/"
# What a file's fields have to be.
_FIELD_TYPES = {
    "matrices": dict,
    "vectors": list,
    "sparse": list,
    "parameters": list,
    "head": list,
    "shapes": dict,
    "rank": int,
    "method": str,
    "backbone_size": int,
    "options": dict,
}


@dataclass
class Plan:
    """Which weights of a backbone are trained.

    Names are logical (``blocks.3.attn.q.weight``, see ``models.matrices``) except under ``parameters`` and ``head``.

    Attributes:
        matrices: logical weight -> kind of its structured module ("lora", "adapter", one's own); block -> "prompt".
        vectors: logical vectors (biases, norm weights) that are tuned whole.
        sparse: logical name -> sorted int64 flat row-major indices of the weights tuned one by one; a name without any
            is left out.
        parameters: the model's own parameters trained in place and counted (``cls_token``).
        head: the head's parameters: trained in place, not counted.
        shapes: shape of everything named above but the head.
        rank: size of the structured modules: rank of LoRA, width of an adapter, number of prompts.
        modules: how the structured modules are set up.
        method: what made the plan ("spt-lora", "spt", "lora", "bias", "linear", "full" ...).
        backbone_size: weights of the backbone, head not counted.
        options: how the plan was made (budget, tau, alpha, beta ...), for the record.
    """

    matrices: dict[str, str] = field(default_factory=dict)
    vectors: list[str] = field(default_factory=list)
    sparse: dict[str, Tensor] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)
    head: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    rank: int = 8
    modules: ModuleOptions = field(default_factory=ModuleOptions)
    method: str = "spt"
    backbone_size: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shapes = {name: tuple(shape) for name, shape in self.shapes.items()}
        self.sparse = {name: indices for name, indices in self.sparse.items() if len(indices)}
        for name, indices in self.sparse.items():
            if name not in self.shapes:
                raise UserError(f"plan: shapes[{name!r}] is missing")
            size = prod(self.shapes[name])
            ascending = indices.dtype == torch.int64 and bool((indices.diff() > 0).all())
            if not ascending or int(indices[0]) < 0 or int(indices[-1]) >= size:
                raise UserError(f"plan: sparse[{name!r}] has to hold ascending int64 indices between 0 and {size - 1}")

    @property
    def num_structured(self) -> int:
        """Trainable parameters in structured modules."""
        return sum(structured_cost(kind, self.shapes[name], self.rank) for name, kind in self.matrices.items())

    @property
    def num_vectors(self) -> int:
        """Trainable parameters in vectors that are tuned whole."""
        return sum(prod(self.shapes[name]) for name in self.vectors)

    @property
    def num_sparse(self) -> int:
        """Weights tuned one by one."""
        return sum(len(indices) for indices in self.sparse.values())

    @property
    def trains_backbone(self) -> bool:
        """Whether the whole backbone is trained in place."""
        return self.num_in_place == self.backbone_size

    @property
    def num_in_place(self) -> int:
        """Trainable parameters among the model's own (``cls_token``), head not counted."""
        return sum(prod(self.shapes[name]) for name in self.parameters)

    @property
    def num_trainable(self) -> int:
        """All trainable parameters; the head is not counted."""
        return self.num_structured + self.num_vectors + self.num_sparse + self.num_in_place

    def summary(self) -> str:
        """A table of the plan: one row an operation, one column a way of tuning."""
        rows: dict[str, Counter[str]] = {}

        def add(name: str, column: str, count: int) -> None:
            rows.setdefault(operation_of(name), Counter())[column] += count

        for name, kind in self.matrices.items():
            add(name, "modules", 1)
            add(name, "structured", structured_cost(kind, self.shapes[name], self.rank))
        for name in self.vectors:
            add(name, "vectors", prod(self.shapes[name]))
        for name, indices in self.sparse.items():
            add(name, "single weights", len(indices))
        for name in self.parameters:
            add(name, "in place", prod(self.shapes[name]))
        columns = ["modules", "structured", "vectors", "single weights", "in place"]
        body = [[name, *(f"{row[column]:,}" for column in columns)] for name, row in sorted(rows.items())]
        totals = [len(self.matrices), self.num_structured, self.num_vectors, self.num_sparse, self.num_in_place]
        body.append(["total", *(f"{value:,}" for value in totals)])
        share = f" ({self.num_trainable / self.backbone_size:.3%} of the backbone)" if self.backbone_size else ""
        title = f"{self.method}: {self.num_trainable:,} trainable parameters{share}, head not counted"
        return format_table(title, ["operation", *columns], body)

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The plan as tensors (the sparse indices) and metadata that JSON can hold."""
        tensors = {_SPARSE_PREFIX + name: indices for name, indices in self.sparse.items()}
        metadata = asdict(self)
        metadata["sparse"] = list(self.sparse)
        return tensors, {"version": FORMAT_VERSION, **metadata}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], metadata: dict[str, Any], source: str | Path) -> "Plan":
        """The inverse of ``to_tensors``; ``source`` names the file in errors.

        Raises:
            UserError: another version, or contents that do not fit together.
        """
        content = dict(metadata)
        version = content.pop("version", None)
        if version not in READABLE_VERSIONS:
            raise UserError(f"{source}: holds a plan of version {version}, this spt_dist reads up to {FORMAT_VERSION}")
        for name, kind in _FIELD_TYPES.items():
            if not isinstance(content.get(name), kind):
                raise UserError(f"{source}: the plan in this file is damaged ({name} is {content.get(name)!r:.80})")
        try:
            content["modules"] = ModuleOptions(**content.get("modules", {}))
            content["sparse"] = {name: tensors[_SPARSE_PREFIX + name] for name in content["sparse"]}
            return cls(**content)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{source}: the plan in this file is damaged ({type(error).__name__}: {error})") from error

    def save(self, path: str | Path) -> None:
        """Write the plan to a safetensors file."""
        tensors, metadata = self.to_tensors()
        save_tensors(path, tensors, {"kind": "plan", "plan": metadata})

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan.

        Raises:
            UserError: the file is missing, truncated, or no plan.
        """
        tensors, metadata = load_tensors(path, "plan")
        return cls.from_tensors(tensors, metadata["plan"], path)

    @classmethod
    def from_spt_release(cls, path: str | Path, preset: str = "paper") -> "Plan":
        """Read an allocation that SPT's authors published for ViT-B/16 (``param_req_*.pth`` of github.com/ziplab/SPT).

        The kind of its modules, LoRA or adapters of rank 8, follows from the file's own count. ``num_trainable`` is
        the file's ``params``, and ``inject`` makes as many parameters trainable: the published code counts single
        weights of norms but does not train them, here they are trained. As there, so are ``cls_token`` and the head.

        Args:
            path: a file as the authors published it. Nothing in it is run: it may hold containers, numbers and
                tensors only.
            preset: how the modules are set up, which is not in the file: "paper" (updates start at zero, no dropout),
                or "released" as in the published code (drawn at random, dropout and drop-path).

        Returns:
            A plan for timm's ``vit_base_patch16_224`` or a model with the same names and shapes.

        Raises:
            UserError: no such file; it is truncated or another file; it refers to other classes or functions; or its
                parts do not fit together; or there is no such preset.
        """
        if preset not in PRESETS:
            raise UserError(f"preset={preset!r}: choose one of {', '.join(PRESETS)}")
        return cls(**read_allocation(path), modules=PRESETS[preset].modules)
