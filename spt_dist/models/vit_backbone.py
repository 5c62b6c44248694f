"""timm's Vision Transformer as a backbone of mmsegmentation.

mmseg's own cannot be tuned: its ``nn.MultiheadAttention`` never calls the layers whose weights it holds.

Shape suffixes: B images, C channels, H, W pixels of a column and of a row, h, w patches likewise, T tokens, D width.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from mmseg.registry import MODELS
from timm.layers import LayerNorm, to_2tuple
from timm.models import VisionTransformer, checkpoint
from torch import Tensor

from spt_dist.errors import UserError
from spt_dist.models.checkpoints import load_backbone
from spt_dist.models.positions import resample_positions, square_grid

_MODES = ("bilinear", "bicubic")
_DEFAULT_EPS = 1e-5


@MODELS.register_module()
class TimmVisionTransformer(VisionTransformer):
    """A plain ViT under timm's names in the place of mmseg's ``VisionTransformer``: SETR configs change ``type`` alone.

    It computes what mmseg's does, except that
    - the patch embedding has a bias by default, as every pre-trained ViT of timm has; checkpoints trained with mmseg's
      SETR configs have none: ``patch_bias=False``;
    - ``drop_path_rate`` drops attention too, ``qkv_bias=False`` leaves the bias of attention's output, both as in timm;
    - positions are resampled wherever the grid of patches is another one, also if it has as many patches.

    ``with_cls_token=False`` keeps the class token's weights, and puts the token away before the blocks.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        embed_dims: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4,
        out_indices: int | Sequence[int] = -1,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        with_cls_token: bool = True,
        norm_cfg: Mapping[str, Any] | None = None,
        act_cfg: Mapping[str, Any] | None = None,
        patch_bias: bool = True,
        final_norm: bool = False,
        interpolate_mode: str = "bicubic",
        with_cp: bool = False,
        pretrained: str | None = None,
        init_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        """Build the backbone with random weights, as timm draws them.

        Args:
            img_size: pixels, ``(height, width)`` or one number: the grid of ``pos_embed``. Images may have any size.
            patch_size: pixels of a patch's side.
            in_channels, embed_dims, num_layers, num_heads, mlp_ratio, qkv_bias: the architecture.
            out_indices: the blocks whose outputs are returned, from 0, or from -1 for the last backwards.
            drop_rate: dropout after the positions, attention's output and both layers of an MLP.
            attn_drop_rate: dropout of attention weights.
            drop_path_rate: stochastic depth of the last block, linearly less before.
            with_cls_token: whether the blocks see the class token.
            norm_cfg: ``dict(type="LN", eps=...)``; ``eps`` is torch's 1e-5 if not given.
            act_cfg: ``dict(type="GELU")``.
            patch_bias: whether the patch embedding has a bias.
            final_norm: whether a norm follows the last block.
            interpolate_mode: how positions are resampled, "bilinear" or "bicubic".
            with_cp: compute blocks anew in the backward pass instead of keeping their activations.
            pretrained: weights that ``init_weights`` loads.
            init_cfg: the same as mmengine has it: ``dict(type="Pretrained", checkpoint=...)``.

        Raises:
            UserError: a value that is not supported.
        """
        super().__init__(
            img_size=to_2tuple(img_size),
            patch_size=patch_size,
            in_chans=in_channels,
            embed_dim=embed_dims,
            depth=num_layers,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            pos_drop_rate=drop_rate,
            proj_drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            norm_layer=partial(LayerNorm, eps=_read_eps(norm_cfg)),
            final_norm=final_norm,
            num_classes=0,
            global_pool="",
            dynamic_img_size=True,
            dynamic_img_pad=True,
            weight_init="skip",
        )
        if dict(act_cfg or {"type": "GELU"}) != {"type": "GELU"}:
            raise UserError(f"backbone.act_cfg={dict(act_cfg or {})}: only dict(type='GELU') is supported")
        if interpolate_mode not in _MODES:
            raise UserError(f"backbone.interpolate_mode={interpolate_mode!r}: has to be one of {', '.join(_MODES)}")
        if not patch_bias:
            self.patch_embed.proj.register_parameter("bias", None)
        self.out_indices = _read_indices(out_indices, num_layers)
        self.interpolate_mode = interpolate_mode
        # timm strips this many leading tokens from its own outputs.
        self.num_prefix_tokens = int(with_cls_token)
        self.checkpoint_location = _read_checkpoint(pretrained, init_cfg)
        self.set_grad_checkpointing(with_cp)
        # timm would have called the method below.
        self.weight_init_mode = ""
        super().init_weights(needs_reset=False)

    def init_weights(self) -> None:  # type: ignore[override]
        """Load the weights that ``pretrained`` or ``init_cfg`` name; without either, do nothing. mmengine calls this.

        Raises:
            UserError: as ``load_backbone``.
        """
        if self.checkpoint_location is not None:
            load_backbone(self, self.checkpoint_location)

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Maps after the blocks ``out_indices``, in the order of the blocks.

        Args:
            images_BCHW: of any height and width; zeros are added below and on the right up to whole patches.

        Returns:
            Each ``(B, D, h, w)``, contiguous.
        """
        patches_BhwD = self.patch_embed(images_BCHW)
        grid = patches_BhwD.shape[1:3]
        tokens_BTD = self._pos_embed(patches_BhwD)
        maps = []
        for index, block in enumerate(self.blocks):
            tokens_BTD = checkpoint(block, tokens_BTD) if self.grad_checkpointing else block(tokens_BTD)
            if index == len(self.blocks) - 1:
                tokens_BTD = self.norm(tokens_BTD)
            if index in self.out_indices:
                patches_BDT = tokens_BTD[:, self.num_prefix_tokens :].transpose(1, 2)
                maps.append(patches_BDT.unflatten(2, grid).contiguous())
        return tuple(maps)

    def fit_pos_embed(self, pos_embed_1PD: Tensor) -> Tensor:
        """Position embeddings of a square grid of patches, class token first, for this model's grid; fp32."""
        old = square_grid(pos_embed_1PD.shape)
        assert old is not None
        return resample_positions(pos_embed_1PD.float(), old, self.patch_embed.grid_size, self.interpolate_mode)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """timm's hook: patches ``(B, h, w, D)`` to tokens ``(B, T, D)`` with their positions."""
        assert self.cls_token is not None and self.pos_embed is not None
        height, width = x.shape[1:3]
        own_grid: tuple[int, int] = self.patch_embed.grid_size
        pos_embed_1TD: Tensor = self.pos_embed
        if (height, width) != own_grid:
            pos_embed_1TD = resample_positions(pos_embed_1TD, own_grid, (height, width), self.interpolate_mode)
        tokens_BTD = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(1, 2)], dim=1)
        tokens_BTD = self.pos_drop(tokens_BTD + pos_embed_1TD)
        return tokens_BTD if self.num_prefix_tokens else tokens_BTD[:, 1:]


def _read_eps(norm_cfg: Mapping[str, Any] | None) -> float:
    settings = dict(norm_cfg or {"type": "LN"})
    eps = settings.pop("eps", _DEFAULT_EPS)
    # What is trained is not the norm's business here.
    if settings.pop("requires_grad", True) is not True or settings != {"type": "LN"}:
        raise UserError(f"backbone.norm_cfg={dict(norm_cfg or {})}: only dict(type='LN', eps=...) is supported")
    return float(eps)


def _read_indices(out_indices: int | Sequence[int], num_layers: int) -> list[int]:
    given = [out_indices] if isinstance(out_indices, int) else list(out_indices)
    if not given or not all(-num_layers <= index < num_layers for index in given):
        raise UserError(
            f"backbone.out_indices={out_indices}: has to name blocks from 0 to {num_layers - 1}, or from -1"
        )
    return sorted({index % num_layers for index in given})


def _read_checkpoint(pretrained: str | None, init_cfg: Mapping[str, Any] | None) -> str | None:
    if init_cfg is None:
        return pretrained
    if pretrained is not None:
        raise UserError(f"backbone.pretrained={pretrained!r} and backbone.init_cfg name weights; leave one of them out")
    if init_cfg.keys() != {"type", "checkpoint"} or init_cfg["type"] != "Pretrained":
        raise UserError(
            f"backbone.init_cfg={dict(init_cfg)}: only dict(type='Pretrained', checkpoint='FILE') is supported"
        )
    return str(init_cfg["checkpoint"])
