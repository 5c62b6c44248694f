"""A ViT within another model, as segmentors hold it, and forwards written out."""

from collections.abc import Callable

from torch import Tensor, nn

from tests.models_for_tests import make_vit


class Held(nn.Module):
    """A ViT under the name ``backbone`` with a head of its own, whose blocks are ``backbone.blocks.0`` and so on."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__()
        self.backbone = make_vit(num_classes=0, **kwargs)
        self.decode_head = nn.Linear(24, 7)

    def get_classifier(self) -> nn.Module:
        """The head, as timm's models tell it."""
        return self.decode_head

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, 16, 16)`` to ``(B, 7)``."""
        return self.decode_head(self.backbone(images))


def through_blocks(plain: nn.Module, images: Tensor, run_block: Callable[[int, nn.Module, Tensor], Tensor]) -> Tensor:
    """A plain ViT's logits, with each block's ``(B, T, D)`` output computed by ``run_block(number, block, input)``."""
    x_BTD = plain._pos_embed(plain.patch_embed(images))
    for number, block in enumerate(plain.blocks):
        x_BTD = run_block(number, block, x_BTD)
    return plain.head(plain.norm(x_BTD)[:, 0])
