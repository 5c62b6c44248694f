"""DINOv3's backbones: rotations in place of position embeddings, registers, and SwiGLU in the "plus" ones."""

import re
from collections.abc import Mapping

from spt_dist.models.formats.class_position import REGISTERS
from spt_dist.models.formats.dinov3_projection import has_biases, take_projection
from spt_dist.models.formats.pre_training import MASKED
from spt_dist.models.formats.prefixes import rename_prefix
from spt_dist.models.formats.rearrange import rows
from spt_dist.models.formats.source import Draft, Shape

NAME = "DINOv3"
_ROTATIONS = "rope_embed.periods"
_IN_BLOCK = re.compile(r"(blocks\.\d+\.)(.+)")
_WEIGHT, _BIAS, _MASK = "attn.qkv.weight", "attn.qkv.bias", "attn.qkv.bias_mask"
_MODULES = {
    "ls1.gamma": "gamma_1",
    "ls2.gamma": "gamma_2",
    # Gate, values, and what comes after their product.
    "mlp.w1.": "mlp.fc1_g.",
    "mlp.w2.": "mlp.fc1_x.",
    "mlp.w3.": "mlp.fc2.",
}


def recognise(names: Mapping[str, Shape]) -> bool:
    """Whether there are rotations, and layer scales under DINO's name."""
    return _ROTATIONS in names and "blocks.0.ls1.gamma" in names


def translate(draft: Draft, wanted: Mapping[str, Shape]) -> None:
    """Rename the parts of each block and the registers."""
    for name in draft.shapes:
        found = _IN_BLOCK.fullmatch(name)
        if found and found[2] == _WEIGHT:
            _take_projection(draft, wanted, found[1])
        elif found and found[2] not in (_BIAS, _MASK):
            draft.take(found[1] + rename_prefix(found[2], _MODULES), name)
        elif name == "storage_tokens":
            draft.take(REGISTERS, name)
        elif name == "mask_token":
            draft.leave(name, MASKED)
        elif name == _ROTATIONS:
            draft.leave(name, "rotations that stand for positions, which the model computes")
        elif name.startswith("local_cls_norm."):
            draft.leave(name, "norm of the class tokens of small crops in pre-training")


def _take_projection(draft: Draft, wanted: Mapping[str, Shape], block: str) -> None:
    """A bias without a mask is the key's too, which no model of timm's has: it stays under the file's name."""
    weight, bias, mask = (block + name for name in (_WEIGHT, _BIAS, _MASK))
    num_rows = draft.shapes[weight][0]
    size = num_rows // 3
    runs = {"q": (0, size), "v": (2 * size, num_rows)}
    zeros = {}
    if draft.shapes.get(bias) == draft.shapes.get(mask) == (num_rows,):
        draft.leave(mask, "takes away the key's bias, which timm's models have not")
        if has_biases(wanted, block):
            for part, (start, stop) in runs.items():
                draft.make(f"{block}attn.{part}_bias", [bias], (size,), rows(start, stop), f"rows of {part}")
        else:
            zeros[bias] = list(runs.values())
    take_projection(draft, block, [weight], zeros)
