"""Per-sample weight gradients of depthwise convolutions.

A channel's gradient is that of a correlation of two small images, for which libraries have no fast kernel if every
sample's is wanted. Row by row it is the sums along some diagonals of ``grads^T inputs``, a product of matrices.

Shape suffixes: B rows, C channels, H W height and width of the output, P Q those of the padded input, h w those of the
kernel, N rows times channels, T columns of the output at a time, U columns of the input under these.
"""

import torch
from torch import Tensor

# Columns of the output at a time: more products are wasted with more of them, and there are more calls with fewer.
_TILE = 32


def depthwise_gradients(
    inputs_BCPQ: Tensor, grads_BCHW: Tensor, kernel: tuple[int, int], dilation: tuple[int, int]
) -> Tensor:
    """Weight gradients of a depthwise convolution with stride 1 and one output a channel, for each row of the batch.

    Args:
        inputs_BCPQ: the padded inputs.
        grads_BCHW: gradients of the outputs, of the same dtype.
        kernel: height and width.
        dilation: likewise.

    Returns:
        ``(B, C, h, w)``: ``G[b, c, i, j] = sum_yx grads[b, c, y, x] inputs[b, c, y + i * dilation, x + j * dilation]``.
    """
    (h, w), (down, right) = kernel, dilation
    height, width = grads_BCHW.shape[2:]
    inputs_NPQ, grads_NHW = inputs_BCPQ.flatten(0, 1).contiguous(), grads_BCHW.flatten(0, 1).contiguous()
    total_Nhw = grads_NHW.new_zeros(len(grads_NHW), h, w)
    for start in range(0, width, _TILE):
        grads_NHT = grads_NHW[:, :, start : start + _TILE]
        columns = grads_NHT.shape[2]
        under = columns + (w - 1) * right
        for i in range(h):
            inputs_NHU = inputs_NPQ[:, i * down : i * down + height, start : start + under]
            products_NTU = torch.bmm(grads_NHT.mT, inputs_NHU).contiguous()
            # Column x of the outputs belongs to columns x, x + right, x + 2 right ... of the inputs.
            strides = (columns * under, under + 1, right)
            total_Nhw[:, i] += products_NTU.as_strided((len(products_NTU), columns, w), strides).sum(dim=1)
    return total_Nhw.view(*grads_BCHW.shape[:2], h, w)
