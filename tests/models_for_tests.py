"""Small models and samples."""

import timm
import torch
from torch import Tensor, nn


def make_vit(seed: int = 0, **kwargs: object) -> nn.Module:
    """A timm ViT with two blocks of width 24 for 16 x 16 images, whose norms and biases are not at their defaults."""
    torch.manual_seed(seed)
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 10}
    model = timm.create_model("vit_tiny_patch16_224", **(options | kwargs))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def make_samples(num_samples: int, seed: int = 0, num_classes: int = 10) -> tuple[Tensor, Tensor]:
    """Random images ``(N, 3, 16, 16)`` and labels ``(N,)``."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num_samples, 3, 16, 16, generator=generator)
    return images, torch.randint(num_classes, (num_samples,), generator=generator)


def fused(name: str) -> tuple[str, int] | None:
    """``blocks.0.attn.k.weight`` -> (``blocks.0.attn.qkv.weight``, 1), ``None`` for a name that is not fused."""
    parts = name.split(".")
    if len(parts) > 2 and parts[-2] in ("q", "k", "v") and parts[-3] == "attn":
        return ".".join([*parts[:-2], "qkv", parts[-1]]), "qkv".index(parts[-2])
    return None


def pick(state: dict[str, Tensor], name: str) -> Tensor:
    """The tensor of a logical name out of a dict with the model's own names."""
    place = fused(name)
    return state[name] if place is None else state[place[0]].chunk(3)[place[1]]
