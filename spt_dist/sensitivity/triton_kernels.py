"""Sums of squared per-sample weight gradients on a GPU, one kernel for all samples of a batch.

``kernels.add_squared_gradients`` says what is computed. One GEMM a sample has to write each sample's gradient to memory
and to read and write the scores once a sample. Here a program holds one tile of the gradient and one of the sum of
squares in registers, goes through the samples and their tokens, and touches the scores once.

Shape suffixes: B samples, T positions within a sample (tokens), I in_features, O out_features.
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
import triton.testing
from torch import Tensor


# B and T change from batch to batch, and where the scores start from layer to layer: one compilation has to do for all.
# Sizes and strides are annotated as what they are inside: with `int` Triton would no longer see which strides are 1.
@triton.jit(do_not_specialize=["B", "T"], do_not_specialize_on_alignment=["scores_ptr"])
def squared_gradients_kernel(
    scores_ptr: tl.tensor,
    inputs_ptr: tl.tensor,
    grads_ptr: tl.tensor,
    B: tl.tensor,
    T: tl.tensor,
    I: tl.tensor,  # noqa: E741
    O: tl.tensor,  # noqa: E741
    scores_stride_o: tl.tensor,
    scores_stride_i: tl.tensor,
    inputs_stride_b: tl.tensor,
    inputs_stride_t: tl.tensor,
    inputs_stride_i: tl.tensor,
    grads_stride_b: tl.tensor,
    grads_stride_t: tl.tensor,
    grads_stride_o: tl.tensor,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> None:
    """One BLOCK_O × BLOCK_I tile of the scores; ``launch`` has the rest."""
    tiles_i = tl.cdiv(I, BLOCK_I)
    tile = tl.program_id(0)
    # Eight tiles down, then one to the right: programs that run together share rows and columns in the L2 cache.
    tile_o, tile_i = tl.swizzle2d(tile // tiles_i, tile % tiles_i, tl.cdiv(O, BLOCK_O), tiles_i, 8)
    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    t = tl.arange(0, BLOCK_T)
    # Offsets in 64 bits: activations of 2^31 elements fit on a GPU.
    o_long, i_long, t_long = o.to(tl.int64), i.to(tl.int64), t.to(tl.int64)
    inputs_ptrs = inputs_ptr + t_long[:, None] * inputs_stride_t + i_long[None, :] * inputs_stride_i
    grads_ptrs = grads_ptr + o_long[:, None] * grads_stride_o + t_long[None, :] * grads_stride_t

    gradient = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    squares = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    blocks = tl.cdiv(T, BLOCK_T)
    # One loop over samples and tokens, not two: so the next sample's loads are under way while this one's are used.
    for step in tl.range(B * blocks):
        b = (step // blocks).to(tl.int64)
        start = (step % blocks) * BLOCK_T
        start_long = start.to(tl.int64)
        in_sample = t < T - start
        inputs_tile = tl.load(
            inputs_ptrs + (b * inputs_stride_b + start_long * inputs_stride_t),
            mask=in_sample[:, None] & (i < I)[None, :],
            other=0.0,
        )
        grads_tile = tl.load(
            grads_ptrs + (b * grads_stride_b + start_long * grads_stride_t),
            mask=(o < O)[:, None] & in_sample[None, :],
            other=0.0,
        )
        gradient = tl.dot(grads_tile, inputs_tile, gradient, input_precision="ieee")
        if start + BLOCK_T >= T:
            squares += gradient * gradient
            gradient = tl.zeros_like(gradient)

    scores_ptrs = scores_ptr + o_long[:, None] * scores_stride_o + i_long[None, :] * scores_stride_i
    mask = (o < O)[:, None] & (i < I)[None, :]
    tl.store(scores_ptrs, tl.load(scores_ptrs, mask=mask) + squares, mask=mask)


def _config(block_o: int, block_i: int, block_t: int, num_warps: int, num_stages: int) -> triton.Config:
    tile = {"BLOCK_O": block_o, "BLOCK_I": block_i, "BLOCK_T": block_t}
    return triton.Config(tile, num_warps=num_warps, num_stages=num_stages)


# Gradient and squares take 8 bytes of registers an element: 128 × 128 is the largest tile that 8 warps can hold. Small
# tiles are for small matrices, whose few large ones would leave most of the GPU idle.
HALF_CONFIGS = [
    _config(128, 128, 64, num_warps=8, num_stages=3),
    _config(128, 128, 32, num_warps=8, num_stages=4),
    _config(128, 64, 32, num_warps=4, num_stages=4),
    _config(64, 64, 32, num_warps=4, num_stages=4),
    _config(32, 32, 32, num_warps=2, num_stages=4),
]
FLOAT_CONFIGS = [
    _config(128, 128, 16, num_warps=8, num_stages=3),
    _config(128, 64, 16, num_warps=8, num_stages=3),
    _config(64, 64, 16, num_warps=4, num_stages=3),
    _config(32, 32, 16, num_warps=2, num_stages=3),
]


def _tuned(configs: list[triton.Config]) -> Any:
    """The kernel with the fastest of ``configs`` for each matrix shape, found on first use and kept on disk.

    B and T are no part of the key: they may change with every batch.
    """
    return triton.autotune(
        configs,
        key=["I", "O"],
        restore_value=["scores_ptr"],  # else every trial would add to the scores
        do_bench=partial(triton.testing.do_bench, warmup=5, rep=25),
        cache_results=True,
    )(squared_gradients_kernel)


_tuned_half = _tuned(HALF_CONFIGS)
_tuned_float = _tuned(FLOAT_CONFIGS)


def add_squared_gradients(scores_OI: Tensor, inputs_BTI: Tensor, grads_BTO: Tensor) -> None:
    """``kernels.add_squared_gradients`` on a GPU, for inputs and gradients of the same dtype.

    bf16 and fp16 are multiplied on tensor cores and summed in fp32; any other dtype is multiplied in full fp32.
    """
    if grads_BTO.dtype in (torch.bfloat16, torch.float16):
        launch(_tuned_half, scores_OI, inputs_BTI, grads_BTO)
    else:
        launch(_tuned_float, scores_OI, inputs_BTI.float(), grads_BTO.float())


def launch(kernel: Any, scores_OI: Tensor, inputs_BTI: Tensor, grads_BTO: Tensor, **options: Any) -> None:
    """Run the kernel over all tiles of the scores.

    Args:
        kernel: the tuned kernel, or the plain one with the ``all_kwargs()`` of a config as ``options``.
        scores_OI: fp32 accumulator of any strides, changed in place.
        inputs_BTI, grads_BTO: both fp32, both bf16 or both fp16, of any strides.
    """
    B, T, I = inputs_BTI.shape  # noqa: E741
    O = grads_BTO.shape[-1]  # noqa: E741

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(O, meta["BLOCK_O"]) * triton.cdiv(I, meta["BLOCK_I"]),)

    strides = (*scores_OI.stride(), *inputs_BTI.stride(), *grads_BTO.stride())
    with torch.cuda.device_of(scores_OI):
        kernel[grid](scores_OI, inputs_BTI, grads_BTO, B, T, I, O, *strides, **options)
