"""Segmentation models of mmseg, built so that scores, engines and task files work on them as on a classifier.

Shape suffixes: B images, C channels, K classes, H height, W width; h, w of a head's own, lower resolution.
"""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.logging import MMLogger
from mmseg.models import EncoderDecoder
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from spt_dist.errors import UserError
from spt_dist.models import vit_backbone  # which registers itself
from spt_dist.models.matrices import SEGMENTATION_HEADS


class Segmentor(EncoderDecoder):
    """mmseg's EncoderDecoder with a forward pass that gives every head's logits, so that engines can wrap it.

    Everything but the backbone is its head: fresh, trained whole, not counted.
    """

    def __init__(self, **settings: Any) -> None:
        """``settings``: the arguments of mmseg's EncoderDecoder, as dicts."""
        self.settings = ConfigDict(copy.deepcopy(settings))
        super().__init__(**copy.deepcopy(self.settings))
        check_heads(self)

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Logits ``(B, K, h, w)``: the decode head's; behind them, where gradients are wanted, the auxiliary heads'.

        Auxiliary heads serve the loss alone.
        """
        features = self.extract_feat(images_BCHW)
        heads = self.loss_heads() if torch.is_grad_enabled() else self.loss_heads()[:1]
        return tuple(head(features) for head in heads)

    def per_image_losses(self, logits: tuple[Tensor, ...], labels_BHW: Tensor) -> Tensor:
        """Each image's own loss, summed over heads: mmseg's loss of a batch that holds this image alone.

        With mmseg's SETR configs (cross-entropy, mean over all pixels) the mean over images is mmseg's loss.

        Args:
            logits: from ``forward`` where gradients are wanted.
            labels_BHW: int64, ``ignore_index`` (255) where there is none.

        Returns:
            fp32 ``(B,)``.
        """
        losses_B: list[list[Tensor]] = [[] for _ in labels_BHW]
        for head, logits_BKhw in zip(self.loss_heads(), logits, strict=True):
            # Cut before they are enlarged: the gradient of a cut is as large as what was cut.
            for place, logits_1Khw in enumerate(logits_BKhw.float().split(1)):
                labels_1HW = labels_BHW[place : place + 1]
                size, align_corners = labels_1HW.shape[1:], head.align_corners
                logits_1KHW = resize(logits_1Khw, size, mode="bilinear", align_corners=align_corners)
                losses_B[place] += [
                    term(logits_1KHW, labels_1HW, ignore_index=head.ignore_index) for term in _loss_terms(head)
                ]
        return torch.stack([torch.stack(terms).sum() for terms in losses_B])

    def loss_heads(self) -> list[Any]:
        """The heads that have a loss, the decode head first."""
        if not self.with_auxiliary_head:
            return [self.decode_head]
        auxiliary = self.auxiliary_head
        return [self.decode_head, *(auxiliary if isinstance(auxiliary, nn.ModuleList) else [auxiliary])]

    def get_classifier(self) -> tuple[nn.Module, ...]:
        """What is made anew for a task: everything behind the backbone."""
        return tuple(getattr(self, name) for name in SEGMENTATION_HEADS if hasattr(self, name))

    def draw_head(self, seed: int) -> dict[str, Tensor]:
        """A fresh head as mmseg initialises it: name -> value of its parameters and buffers, on the CPU."""
        values: dict[str, Tensor] = {}
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), _quiet():
            torch.manual_seed(seed)
            for name in SEGMENTATION_HEADS:
                settings = self.settings.get(name)
                for place, one in enumerate(settings if isinstance(settings, list) else [settings]):
                    if one is None:
                        continue
                    prefix = f"{name}.{place}." if isinstance(settings, list) else f"{name}."
                    module = MODELS.build(copy.deepcopy(one))
                    if hasattr(module, "init_weights"):
                        module.init_weights()
                    values |= {prefix + key: value for key, value in module.state_dict().items()}
        return values

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of the backbone's blocks for the backward pass."""
        self.backbone.set_grad_checkpointing(enable)


def create_segmentor(num_classes: int, settings: dict[str, Any]) -> Segmentor:
    """The segmentation model of a config.

    Args:
        num_classes: of every head.
        settings: arguments of mmseg's EncoderDecoder; its ``data_preprocessor`` and ``pretrained`` are not taken, as
            the data set normalises the images and ``model.checkpoint`` names the weights.

    Raises:
        UserError: mmseg refuses an argument, or a head has another number of classes.
    """
    settings = copy.deepcopy(settings)
    _check_backbone(settings.get("backbone") or {})
    for key, instead in (("data_preprocessor", "data.mean and data.std"), ("pretrained", "model.checkpoint")):
        if settings.get(key) is not None:
            raise UserError(f"config: model.kwargs.{key}: is not taken from there; use {instead}")
    auxiliary = settings.get("auxiliary_head")
    for head in [settings.get("decode_head"), *(auxiliary if isinstance(auxiliary, list) else [auxiliary])]:
        if isinstance(head, dict) and head.setdefault("num_classes", num_classes) != num_classes:
            raise UserError(
                f"config: model.num_classes={num_classes}, but a head in model.kwargs has {head['num_classes']}; leave "
                "num_classes out of the heads"
            )
    _check_test_cfg(settings.get("test_cfg") or {})
    try:
        with _quiet():
            return Segmentor(**settings)
    except UserError:
        raise
    # mmseg checks its arguments with whatever is at hand.
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError, AttributeError) as error:
        raise UserError(f"config: model.kwargs: mmseg does not take them ({error})") from error


def check_heads(model: Segmentor) -> None:
    """Refuse heads whose loss, or batch norm, this package does not compute as mmseg does.

    Raises:
        UserError: names what is not supported.
    """
    for head in model.loss_heads():
        where = f"a segmentor's {type(head).__name__}"
        if head.sampler is not None:
            raise UserError(f"{where} has a sampler, which picks pixels across images; leave it out")
        if head.out_channels != head.num_classes:
            raise UserError(f"{where} has out_channels={head.out_channels}; leave it out")
        if any(getattr(type(head), name) is not getattr(BaseDecodeHead, name) for name in ("loss", "loss_by_feat")):
            raise UserError(f"{where} has a loss of its own kind, which is not supported; take a SETR or FCN head")
    for norm in model.modules():
        if isinstance(norm, _BatchNorm) and (not norm.track_running_stats or not norm.affine or norm.momentum is None):
            raise UserError(
                "a segmentor's batch norm has affine=False, track_running_stats=False or momentum=None; leave these at "
                "their defaults in norm_cfg"
            )


def _check_backbone(backbone: dict[str, Any]) -> None:
    if str(backbone.get("type")).rpartition(".")[2] == "VisionTransformer":
        raise UserError(
            "config: model.kwargs.backbone.type='VisionTransformer': mmseg's own never calls the layers whose weights "
            "its attention uses, so that these can't be tuned; 'TimmVisionTransformer' takes the same arguments"
        )
    taps, num_layers = backbone.get("out_indices"), backbone.get("num_layers")
    if isinstance(taps, list | tuple) and num_layers and not {-1, num_layers - 1} & set(taps):
        raise UserError(
            f"config: model.kwargs.backbone.out_indices={taps}: the blocks behind the last of them would be tuned for "
            f"nothing; make num_layers={max(taps) + 1}, or tap block {num_layers - 1}"
        )
    for key in ("pretrained", "init_cfg"):
        if backbone.get(key) is not None:
            raise UserError(f"config: model.kwargs.backbone.{key}: is not taken from there; use model.checkpoint")


def _check_test_cfg(test_cfg: dict[str, Any]) -> None:
    """Refuse windows that an evaluation, at the end of a training, would refuse."""
    if test_cfg.get("mode") == "whole":
        return
    sizes = [test_cfg.get(key) for key in ("stride", "crop_size")]
    known = test_cfg.get("mode") == "slide" and all(isinstance(size, list | tuple) and len(size) == 2 for size in sizes)
    if not known or not all(0 < stride <= crop for stride, crop in zip(*sizes, strict=True)):
        raise UserError(
            f"config: model.kwargs.test_cfg={test_cfg}: has to be dict(mode='whole'), or dict(mode='slide', "
            "crop_size=(512, 512), stride=(341, 341)) with strides up to the crop's size"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what mmengine says about each parameter it initialises, and mmseg about its own defaults."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _loss_terms(head: nn.Module) -> list[nn.Module]:
    terms: Any = head.loss_decode
    return list(terms) if isinstance(terms, nn.ModuleList) else [terms]


__all__ = ["Segmentor", "create_segmentor", "vit_backbone"]
