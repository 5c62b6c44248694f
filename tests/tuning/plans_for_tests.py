"""Small models of several families, and random plans for them."""

from typing import Any

import timm
import torch
from torch import Tensor, nn

from spt_dist import Plan, trainable_parameters
from spt_dist.allocation.kinds import ModuleOptions
from spt_dist.models.matrices import take_inventory
from tests.models_for_tests import make_samples, make_vit

SMALL_SWIN: dict[str, Any] = {"img_size": 56, "embed_dim": 24, "depths": (1, 2), "num_heads": (1, 2)}
SMALL_CONVNEXT: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
# Name of the architecture, its arguments and its images' size; the plain ViT of all tests has no name.
MODELS: dict[str, tuple[str | None, dict[str, Any], int]] = {
    "vit": (None, {}, 16),
    "registers, layer scale": (None, {"init_values": 1e-2, "reg_tokens": 2}, 16),
    "windows": ("swin_tiny_patch4_window7_224", SMALL_SWIN, 56),
    "convolutions": ("convnext_atto", SMALL_CONVNEXT, 128),
}


def make_model(kind: str) -> nn.Module:
    """A small model whose parameters are not at their defaults; always the same one."""
    name, kwargs, _ = MODELS[kind]
    if name is None:
        return make_vit(**kwargs)
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **kwargs)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def make_images(kind: str, num_samples: int = 4) -> tuple[Tensor, Tensor]:
    """Random images for ``make_model`` and their labels."""
    size = MODELS[kind][2]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_samples, 3, size, size, generator=generator), make_samples(num_samples)[1]


def random_plan(
    model: nn.Module, seed: int, kinds: tuple[str, ...] = ("lora",), modules: ModuleOptions | None = None
) -> Plan:
    """Each parameter is frozen, structured, whole or sparse at random, but for the model's head and cls_token.

    Args:
        model: plain.
        seed: of all choices.
        kinds: of the structured modules; with "prompt", every other block has prompts.
        modules: how they are set up.
    """
    generator = torch.Generator().manual_seed(seed)
    inventory = take_inventory(model)
    plan = Plan(
        parameters=inventory.always_tuned,
        head=inventory.head,
        rank=2,
        modules=modules or ModuleOptions(),
        backbone_size=inventory.backbone_size,
    )
    for name in inventory.always_tuned:
        plan.shapes[name] = tuple(model.get_parameter(name).shape)
    on_matrices = [kind for kind in kinds if kind != "prompt"]
    for parameter in inventory.parameters:
        how = int(torch.randint(3, (), generator=generator))
        # Biases of k, an adapter's too, have no gradient: Adam would blow rounding noise up to whole steps.
        if how == 0 or parameter.name.endswith("attn.k.bias") or parameter.name in inventory.always_tuned:
            continue
        if how == 1 and parameter.is_matrix and on_matrices:
            kind = on_matrices[len(plan.matrices) % len(on_matrices)]
            if kind == "adapter" and parameter.name.endswith("attn.k.weight"):
                continue
            plan.matrices[parameter.name] = kind
        elif how == 1:
            plan.vectors.append(parameter.name)
        else:
            count = int(torch.randint(1, parameter.numel + 1, (), generator=generator))
            plan.sparse[parameter.name] = torch.randperm(parameter.numel, generator=generator)[:count].sort().values
        plan.shapes[parameter.name] = parameter.shape
    if "prompt" in kinds:
        for block in range(seed % 2, 2, 2):
            plan.matrices[f"blocks.{block}"] = "prompt"
            plan.shapes[f"blocks.{block}"] = (model.get_parameter("blocks.0.norm1.weight").numel(),)
    return plan


def disturb(model: nn.Module, seed: int = 1) -> None:
    """Move every trained parameter, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in trainable_parameters(model):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
