"""timm's two-layer perceptron, telling its second layer what that layer's input was computed from."""

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from spt_dist.tuning.layers import TunedLinear
from spt_dist.tuning.recompute import Activated


class TunedMlp(Mlp):
    """An ``Mlp`` whose tuned second layer keeps nothing of its input, see ``recompute``."""

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``, as ``Mlp``."""
        hidden = self.fc1(x)
        activated = self.act(hidden)
        inputs = self.norm(self.drop1(activated))
        # Dropout and norm, where there is any, make another tensor of it. GELU keeps its input only if that has a
        # gradient. torch.compile decides itself what to keep.
        known = inputs is activated and hidden.requires_grad and not torch.compiler.is_compiling()
        source = Activated(hidden, self.act) if known else None
        outputs: Tensor = self.drop2(self.fc2(inputs, source))
        return outputs


def spare_activations(model: nn.Module) -> None:
    """Make each ``Mlp`` with GELU and a tuned second layer a ``TunedMlp``, in place."""
    for module in model.modules():
        # GELU keeps its input; of other functions it may be the output that is kept.
        if type(module) is Mlp and isinstance(module.fc2, TunedLinear) and isinstance(module.act, nn.GELU):
            module.__class__ = TunedMlp


def restore_plain(model: nn.Module) -> None:
    """Undo ``spare_activations``."""
    for module in model.modules():
        if type(module) is TunedMlp:
            module.__class__ = Mlp  # type: ignore[assignment]
