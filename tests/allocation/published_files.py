"""Allocation files written as SPT's published code wrote them."""

import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

OPERATIONS = ("q", "k", "v", "proj", "fc1", "fc2")
IN_BLOCK = {
    "norm1.weight": (768,),
    "norm1.bias": (768,),
    "attn.q.weight": (768, 768),
    "attn.q.bias": (768,),
    "attn.k.weight": (768, 768),
    "attn.k.bias": (768,),
    "attn.v.weight": (768, 768),
    "attn.v.bias": (768,),
    "attn.proj.weight": (768, 768),
    "attn.proj.bias": (768,),
    "norm2.weight": (768,),
    "norm2.bias": (768,),
    "mlp.fc1.weight": (3072, 768),
    "mlp.fc1.bias": (3072,),
    "mlp.fc2.weight": (768, 3072),
    "mlp.fc2.bias": (768,),
}
NAMES = {
    **{f"blocks.{block}.{name}": shape for block in range(12) for name, shape in IN_BLOCK.items()},
    "norm.weight": (768,),
    "norm.bias": (768,),
}


def numel(name: str) -> int:
    return int(np.prod(NAMES[name]))


@dataclass
class Release:
    """What a published file says, and how it is written.

    Attributes:
        kind: of the structured modules.
        matrices: as (block, operation).
        vectors: names of vectors tuned whole.
        sparse: name -> flat positions in it.
    """

    kind: str = "lora"
    matrices: list[tuple[int, str]] = field(default_factory=list)
    vectors: list[str] = field(default_factory=list)
    sparse: dict[str, list[int]] = field(default_factory=dict)

    @property
    def matrix_names(self) -> list[str]:
        groups = {"fc1": "mlp", "fc2": "mlp"}
        return [f"blocks.{block}.{groups.get(name, 'attn')}.{name}.weight" for block, name in self.matrices]

    def content(self) -> dict[str, Any]:
        """The dict that the published code saves; the costs are written out as in that code, for rank 8."""
        rest = {name: shape for name, shape in NAMES.items() if name not in {*self.matrix_names, *self.vectors}}
        structured = sum(numel(name) for name in self.vectors)
        for name in self.matrix_names:
            out_features, in_features = NAMES[name]
            lora, adapter = 8 * (in_features + out_features), 2 * 8 * out_features + 8 + out_features
            structured += {"lora": lora, "adapter": adapter}[self.kind]
        indexes, start = [], 0
        for name in rest:
            indexes += [start + position for position in self.sparse.get(name, [])]
            start += numel(name)
        return {
            "unstructured_name_shapes": {name: torch.Size(shape) for name, shape in rest.items()},
            "unstructured_name_shapes_int": {name: np.int64(numel(name)) for name in rest},
            "params": torch.tensor((structured + len(indexes) + 768) / 1e6),
            "unstructured_params": torch.tensor(float(len(indexes))),
            "structured_params": structured,
            "unstructured_indexes": torch.tensor(indexes, dtype=torch.int64),
            "tuned_matrices": [[int((block, name) in self.matrices) for name in OPERATIONS] for block in range(12)],
            "tuned_vectors": self.vectors,
        }


def write(path: Path, content: Any) -> Path:
    """Save as the authors did: with numpy 1, from a GPU."""
    fresh = path.with_suffix(".fresh")
    torch.save(content, fresh)
    with zipfile.ZipFile(fresh) as source, zipfile.ZipFile(path, "w") as target:
        for record in source.namelist():
            data = source.read(record)
            if record.endswith("data.pkl"):
                data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
                data = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            target.writestr(record, data)
    return path


# Some of everything: all operations, an entry of a fused matrix and its bias, of norms, first and last entries.
SOME = Release(
    matrices=[(0, "v"), (3, "proj"), (3, "fc1"), (7, "fc2"), (11, "q"), (11, "k")],
    vectors=["blocks.0.norm1.bias", "blocks.0.attn.v.bias", "blocks.3.mlp.fc1.bias", "norm.weight"],
    sparse={
        "blocks.0.norm1.weight": [0, 5, 767],
        "blocks.0.attn.q.weight": [0, 767, 768, 589_823],
        "blocks.0.attn.q.bias": [3],
        "blocks.5.attn.k.weight": [1, 100, 2_000],
        "blocks.5.attn.v.weight": [7, 500_000],
        "blocks.5.mlp.fc1.weight": [2_359_295],
        "blocks.5.mlp.fc2.weight": [3_071, 3_072],
        "norm.bias": [0, 767],
    },
)
