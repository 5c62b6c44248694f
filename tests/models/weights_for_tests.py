"""Files of weights, and a small model that is to a file what a segmentor is."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from spt_dist.models.positions import resample_positions, square_grid
from tests.models_for_tests import make_vit


class Backbone(nn.Module):
    """What a backbone of a segmentor is to a file: a ViT that takes other grids, with or without its last norm."""

    def __init__(self, final_norm: bool = False, img_size: int = 16) -> None:
        super().__init__()
        vit = make_vit(seed=5, num_classes=0, img_size=img_size, final_norm=final_norm)
        for name, module in vit.named_children():
            self.add_module(name, module)
        self.cls_token, self.pos_embed = vit.cls_token, vit.pos_embed

    def fit_pos_embed(self, value: Tensor) -> Tensor:
        """The model's grid is square here; a mode that nothing takes by default shows that this one is asked."""
        grid, own = square_grid(value.shape), square_grid(self.pos_embed.shape)
        assert grid and own
        return resample_positions(value, grid, own, "bilinear")


class SmallSegmentor(nn.Module):
    """A backbone, a neck and two kinds of heads."""

    def __init__(self, final_norm: bool = False, img_size: int = 16) -> None:
        super().__init__()
        self.backbone = Backbone(final_norm, img_size)
        self.neck = nn.Linear(24, 5)
        self.decode_head = nn.Linear(5, 3)
        self.auxiliary_head = nn.ModuleList([nn.Linear(5, 3)])

    def get_classifier(self) -> tuple[nn.Module, ...]:
        """As mmseg's models tell what is made anew for a task."""
        return (self.neck, self.decode_head, self.auxiliary_head)


def write(path: Path, state: dict[str, Any]) -> str:
    """A file of weights in the format of its suffix."""
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return str(path)


def differing(found: nn.Module, wanted: dict[str, Tensor]) -> list[str]:
    """Parameters of a module that are not what a state dict has under the same names."""
    return [name for name, value in found.state_dict().items() if not torch.equal(value, wanted[name])]


def as_jax(state: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Under the names and in the layout of the first published ``.npz`` files, heads of 12 channels."""
    found = {
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "embedding/kernel": state["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
    }
    for block in range(sum(name.endswith("norm1.weight") for name in state)):
        old, new = f"blocks.{block}.", f"Transformer/encoderblock_{block}/"
        for norm, own in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            found |= {
                new + own + "/scale": state[old + norm + ".weight"],
                new + own + "/bias": state[old + norm + ".bias"],
            }
        for number, layer in enumerate(("fc1", "fc2")):
            own = f"{new}MlpBlock_3/Dense_{number}/"
            found |= {
                own + "kernel": state[f"{old}mlp.{layer}.weight"].T,
                own + "bias": state[f"{old}mlp.{layer}.bias"],
            }
        attention = new + "MultiHeadDotProductAttention_1/"
        for number, part in enumerate(("query", "key", "value")):
            rows = slice(24 * number, 24 * (number + 1))
            found[f"{attention}{part}/kernel"] = state[old + "attn.qkv.weight"][rows].T.reshape(24, 2, 12)
            found[f"{attention}{part}/bias"] = state[old + "attn.qkv.bias"][rows].reshape(2, 12)
        found[attention + "out/kernel"] = state[old + "attn.proj.weight"].T.reshape(2, 12, 24)
        found[attention + "out/bias"] = state[old + "attn.proj.bias"]
    return {name: value.numpy() for name, value in found.items()}
