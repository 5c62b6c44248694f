"""What kind of trouble an exception is."""

import torch
import torch.distributed as dist

from spt_dist.errors import UserError

# gloo raises plain RuntimeErrors, whose text begins with the place in its source.
_GLOO = "gloo/"
# The CPU's allocator does too.
_ALLOCATOR = "can't allocate memory"


def is_mistake(error: BaseException) -> bool:
    """Whether the user can mend it: a ``UserError``, or an ``OSError`` about a file."""
    return isinstance(error, UserError) or (isinstance(error, OSError) and error.filename is not None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the GPU or of the machine ran out."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and _ALLOCATOR in str(error)
    )


def is_lost_peer(error: BaseException) -> bool:
    """Whether the error only says that another rank did not answer, so that the cause is elsewhere."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _GLOO in str(error))


def memory_advice(error: BaseException) -> str:
    """The first line of an out-of-memory error, and what to do."""
    first = next(iter(str(error).splitlines()), "") or type(error).__name__
    return f"{first}; lower train.batch_size, raise train.accumulation, or set engine.activation_checkpointing=True"
