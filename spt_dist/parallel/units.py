"""The parts of a model that engines treat one after the other: its blocks."""

from torch import nn

from spt_dist.allocation.costs import block_of


def find_units(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model in its own order, those within others before these.

    A block is what is numbered: ``blocks.3``; Swin's ``layers.1.blocks.0``, and ``layers.1`` with what else is in it.
    """
    names = dict.fromkeys(filter(None, (block_of(name) for name, _ in model.named_parameters())))
    inner_first = sorted(names, key=lambda name: -name.count("."))
    return [model.get_submodule(name) for name in inner_first]
