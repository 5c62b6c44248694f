"""What becomes of all parameters of a model, before it has any values."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from spt_dist.errors import UserError
from spt_dist.models.losses import sample_losses, targets_shape
from spt_dist.models.matrices import take_inventory
from spt_dist.sensitivity.modes import scoring_mode
from spt_dist.sensitivity.scoring import PassOptions, ScoringPass


def find_image_shape(model: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model is made for.

    Args:
        model: timm's or mmseg's.
        arguments: it was built with; their ``img_size`` comes before what timm says of the architecture.

    Raises:
        UserError: nothing tells.
    """
    backbone = arguments.get("backbone")
    inner = backbone if isinstance(backbone, Mapping) else arguments
    size = inner.get("img_size")
    channels, *known = (getattr(model, "default_cfg", None) or {}).get("input_size", (3,))
    if size is None and not known:
        raise UserError(f"{type(model).__name__}: nothing says how large its images are; give model.kwargs an img_size")
    height, width = known if size is None else (size, size) if isinstance(size, int) else size
    return inner.get("in_chans", channels), height, width


def describe_coverage(model: nn.Module, image_shape: tuple[int, int, int]) -> str:
    """The inventory's table, with what a scoring pass over such images finds that it can't score.

    The pass is one of tensors that have shapes only, so the largest models take neither memory nor time.

    Args:
        model: on torch's meta device; changed in place.
        image_shape: channels, height and width.

    Returns:
        Lines for the terminal.

    Raises:
        UserError: as ``estimate_sensitivity``; or the model does not take such images.
    """
    inventory = take_inventory(model)
    options = PassOptions(per_sample=True, dtype=None, lockstep=False, shard_sums=False)
    with FakeTensorMode():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype))
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        images = torch.empty(1, *image_shape)
        targets = torch.empty(targets_shape(model, (1, *image_shape)), dtype=torch.int64)
        scoring = ScoringPass(model, inventory, sample_losses(model), options, torch.device("cpu"))
        try:
            with scoring_mode(model, train_mode=False), scoring.attached():
                skipped = scoring.find_skipped(images, targets)
        except UserError:
            raise
        # timm checks the size by assertion; torch's layers have errors of their own.
        except (AssertionError, RuntimeError, IndexError) as error:
            size = " x ".join(map(str, image_shape[1:]))
            raise UserError(
                f"{type(model).__name__} does not take images of {size} pixels ({error}); give model.kwargs an img_size"
            ) from error
    return inventory.summary(skipped)
