"""How much memory a sample's activations take."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from spt_dist.sensitivity.scoring import ScoringPass


def count_saved_bytes(scoring: ScoringPass, inputs: Any, targets: Any) -> int:
    """Bytes that a pass over some samples keeps from the forward for the backward pass, weights not counted.

    What a gradient checkpoint computes anew is not kept. With sharded weights, those gathered for a layer count too.
    """
    whole = [parameter for parameter in scoring.model.parameters() if not isinstance(parameter, DTensor)]
    weights = {parameter.untyped_storage().data_ptr() for parameter in whole}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        scoring.observe(inputs, targets, lambda name, scores: None)
    return sum(kept.values())
