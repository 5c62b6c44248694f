"""Prompts: further tokens in the input of one block.

Shape suffixes: B batch, P prompts, T tokens, D width.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from spt_dist.errors import UserError

# VPT draws from U(-v, v) with v = sqrt(6 / (3 * 16^2 + D)), for patches of 16 x 16 pixels.
_PATCH_SIZE = 3 * 16**2


class Prompts(nn.Module):
    """Trained tokens that go through one block and are left out behind it (VPT-deep, Jia et al. 2022, section 3.2).

    As there, each block has prompts of its own, and what a block makes of them is dropped. Blocks have no position
    code, so prompts stand behind all other tokens, which leaves the places of those as they are.
    """

    def __init__(
        self,
        num_prompts: int,
        width: int,
        init: str = "zero",
        dropout: float = 0.0,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(num_prompts, width, device=device))
        self.dropout = nn.Dropout(dropout)
        if init == "normal":
            nn.init.trunc_normal_(self.tokens, std=0.02)
        else:
            # Not zeros: equal prompts have equal gradients, and would stay one for ever.
            bound = math.sqrt(6 / (_PATCH_SIZE + width))
            nn.init.uniform_(self.tokens, -bound, bound)

    def attach(self, block: nn.Module) -> None:
        """Become the submodule ``prompts`` of ``block``, and change its input and output from now on."""
        block.add_module("prompts", self)
        block.register_forward_pre_hook(self.append, with_kwargs=True)
        block.register_forward_hook(self.cut)

    def detach(self, block: nn.Module) -> None:
        """Undo ``attach``."""
        del block.prompts
        for hooks in (block._forward_pre_hooks, block._forward_hooks):
            # No handles are kept for this: they would be lost in a copy of the model.
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                del hooks[key]
                block._forward_pre_hooks_with_kwargs.pop(key, None)

    def append(
        self, block: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A block's inputs with ``(B, T, D)`` tokens made ``(B, T + P, D)``.

        Raises:
            UserError: the block is given a mask, which is made for the tokens without prompts.
        """
        if options.get("attn_mask") is not None:
            raise UserError("prompts: this model masks its attention, and masks have no room for prompts; use LoRA")
        x_BTD, *others = inputs
        tokens_BPD = self.dropout(self.tokens.expand(len(x_BTD), -1, -1))
        return (torch.cat([x_BTD, tokens_BPD.to(x_BTD.dtype)], dim=1), *others), options

    def cut(self, block: nn.Module, inputs: tuple[Any, ...], outputs_BTD: Tensor) -> Tensor:
        """A block's output tokens without the prompts."""
        return outputs_BTD[:, : -len(self.tokens)]


def check_block(model: nn.Module, name: str) -> nn.Module:
    """The block of that name.

    Raises:
        UserError: it is no block that takes any number of tokens.
    """
    from timm.models.vision_transformer import Block, ResPostBlock

    block = dict(model.named_modules()).get(name)
    if not isinstance(block, Block | ResPostBlock):
        found = f"a {type(block).__name__}" if block is not None else "not in this model"
        raise UserError(
            f'plan: prompts for {name}, which is {found}; structured="prompt" works with the blocks of timm\'s '
            'VisionTransformer only, choose "lora" or "adapter" for other models'
        )
    return block
