"""Parameters that an engine has spread over the ranks: FSDP2's and ZeRO-3's."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def is_sharded(model: nn.Module) -> bool:
    """Whether some of the model's parameters are spread over the ranks, so that every forward is collective."""
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_shape") for parameter in model.parameters())


def is_part(tensor: Tensor) -> bool:
    """Whether this is only a rank's part of a parameter, which is gathered while its layer runs."""
    return isinstance(tensor, DTensor) or tuple(tensor.shape) != whole_shape(tensor)


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """A parameter's shape, also where it is spread over the ranks."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def own_rows(tensor: DTensor) -> slice:
    """The rows of a parameter sharded by FSDP2 that are this rank's; none where there are fewer rows than ranks."""
    shape, (start, *_) = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return slice(start, start + shape[0])


@torch.no_grad()
def fill(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole value to a parameter that may be sharded by FSDP2; every rank gives the same."""
    if isinstance(parameter, DTensor):
        parameter.to_local().copy_(value[own_rows(parameter)])
    else:
        parameter.copy_(value)


def whole_value(tensor: Tensor) -> Tensor:
    """A parameter's or buffer's value, whole on every rank. Collective if it is spread over the ranks.

    Returns:
        Detached; the tensor's own memory where it was whole already.
    """
    if isinstance(tensor, DTensor):
        whole: Tensor = tensor.full_tensor()
        return whole.detach()
    if hasattr(tensor, "ds_shape"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.detach()
