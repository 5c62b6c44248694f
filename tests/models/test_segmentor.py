"""The segmentation model: its loss against mmseg's own, its head, what is scored and what a task file holds."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.structures import PixelData
from mmseg.models import EncoderDecoder
from mmseg.structures import SegDataSample
from torch import Tensor

import spt_dist
from spt_dist import UserError
from spt_dist.models.classifier import SEGMENTOR, create_model, head_values
from spt_dist.models.losses import sample_losses
from spt_dist.models.matrices import head_buffers, take_inventory
from spt_dist.models.segmentor import Segmentor
from spt_dist.tuning.methods import make_plan
from tests.segmentors_for_tests import NUM_CLASSES, SETTINGS, make_segmentor

IMAGE = 32


def make_batch(num_images: int = 3) -> tuple[Tensor, Tensor]:
    """Images and labels; each image has another share of pixels without a label."""
    generator = torch.Generator().manual_seed(1)
    images_BCHW = torch.randn(num_images, 3, IMAGE, IMAGE, generator=generator)
    labels_BHW = torch.randint(NUM_CLASSES, (num_images, IMAGE, IMAGE), generator=generator)
    for place in range(num_images):
        labels_BHW[place, : 8 * place] = 255
    return images_BCHW, labels_BHW


def mmseg_loss(model: Any, images_BCHW: Tensor, labels_BHW: Tensor) -> Tensor:
    """What mmseg's training step minimises."""
    samples = [SegDataSample(gt_sem_seg=PixelData(data=label_HW.unsqueeze(0))) for label_HW in labels_BHW]
    losses = EncoderDecoder.loss(model, images_BCHW, samples)
    return sum(value for name, value in losses.items() if "loss" in name)


def assert_scores(found: Tensor, expected: Tensor) -> None:
    """Equal, those next to zero as compared with the largest."""
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5 * float(expected.max()))


def test_the_mean_over_images_is_mmsegs_loss() -> None:
    model = make_segmentor().eval()
    images_BCHW, labels_BHW = make_batch()
    losses_B = sample_losses(model)(model(images_BCHW), labels_BHW)
    torch.testing.assert_close(losses_B.mean(), mmseg_loss(model, images_BCHW, labels_BHW))
    for place in range(len(images_BCHW)):
        one = slice(place, place + 1)
        torch.testing.assert_close(losses_B[place], mmseg_loss(model, images_BCHW[one], labels_BHW[one]))


def test_auxiliary_heads_are_left_out_where_no_gradient_is_wanted() -> None:
    model = make_segmentor().eval()
    images_BCHW, _ = make_batch()
    both = model(images_BCHW)
    assert [tuple(logits.shape) for logits in both] == [(3, NUM_CLASSES, 8, 8)] * 2
    with torch.no_grad():
        (alone,) = model(images_BCHW)
    torch.testing.assert_close(alone, both[0])
    torch.testing.assert_close(alone, EncoderDecoder._forward(model, images_BCHW))


def test_the_head_is_all_but_the_backbone_and_hangs_on_the_seed_alone() -> None:
    model = make_segmentor(seed=3)
    inventory = take_inventory(model)
    assert {name.split(".")[0] for name in inventory.head} == {"decode_head", "auxiliary_head"}
    assert {parameter.name.split(".")[0] for parameter in inventory.parameters} == {"backbone"}
    assert inventory.always_tuned == ["backbone.cls_token"]
    torch.manual_seed(99)
    drawn = head_values(create_model(SEGMENTOR, NUM_CLASSES, SETTINGS, torch.device("meta")), 3)
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("backbone")}
    assert drawn.keys() == own.keys()
    assert all(torch.equal(drawn[name], own[name]) for name in own)
    # As mmseg initialises it, and not as a classifier's head: a norm's scale of zero would stop all gradients.
    assert torch.equal(own["decode_head.up_convs.0.0.bn.weight"], torch.ones(8))
    assert 0.005 < float(own["decode_head.conv_seg.weight"].std()) < 0.02
    assert not torch.equal(head_values(model, 4)["decode_head.conv_seg.weight"], own["decode_head.conv_seg.weight"])


def test_scores_are_sums_over_images_of_squared_gradients() -> None:
    """In float64, image by image, through mmseg's loss with the auxiliary heads."""
    model = make_segmentor().eval()
    for head in model.loss_heads():
        # Heads are so small at first that gradients behind them hardly are numbers.
        head.conv_seg.weight.data *= 100
    images_BCHW, labels_BHW = make_batch()
    scores = spt_dist.estimate_sensitivity(model, [(images_BCHW, labels_BHW)], sample_losses(model))
    oracle = copy.deepcopy(model).double()
    expected = {name: torch.zeros_like(parameter) for name, parameter in oracle.named_parameters()}
    for place in range(len(images_BCHW)):
        oracle.zero_grad()
        one = slice(place, place + 1)
        mmseg_loss(oracle, images_BCHW[one].double(), labels_BHW[one]).backward()
        for name, parameter in oracle.named_parameters():
            expected[name] += parameter.grad.square()
    for part, rows in zip("qkv", expected["backbone.blocks.1.attn.qkv.weight"].chunk(3), strict=True):
        name = f"backbone.blocks.1.attn.{part}.weight"
        assert_scores(scores[name], rows)
    for name in ("backbone.patch_embed.proj.weight", "backbone.blocks.0.mlp.fc2.weight", "backbone.pos_embed"):
        assert_scores(scores[name], expected[name])
    # The squared gradient of the batch's loss is something else.
    oracle.zero_grad()
    mmseg_loss(oracle, images_BCHW.double(), labels_BHW).backward()
    wrong = 9 * oracle.get_parameter("backbone.blocks.0.mlp.fc2.weight").grad.square()
    with pytest.raises(AssertionError):
        assert_scores(wrong, expected["backbone.blocks.0.mlp.fc2.weight"])


def test_a_task_file_holds_the_running_means_of_the_head(tmp_path: Path) -> None:
    model = make_segmentor()
    tuned = spt_dist.inject(model, make_plan("lora", model, rank=2))
    for name, parameter in spt_dist.trainable_parameters(tuned):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    buffers = head_buffers(tuned)
    assert len(buffers) == 4
    for name, buffer in buffers.items():
        buffer.copy_(torch.rand(buffer.shape, generator=torch.Generator().manual_seed(len(name))))
    spt_dist.save_delta(tuned, tmp_path / "task.safetensors")
    loaded = spt_dist.load_delta(make_segmentor(seed=0), tmp_path / "task.safetensors").eval()
    images_BCHW, _ = make_batch()
    with torch.no_grad():
        (expected,) = tuned.eval()(images_BCHW)
        (found,) = loaded(images_BCHW)
        assert torch.equal(found, expected)
        (merged,) = spt_dist.merge(loaded)(images_BCHW)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decode_head": {"type": "SETRUPHed"}}, "mmseg does not take them .*SETRUPHed"),
        ({"decode_head": SETTINGS["decode_head"] | {"num_classes": 7}}, "num_classes=5, but a head .* has 7"),
        ({"data_preprocessor": {"type": "SegDataPreProcessor"}}, "data_preprocessor: .*use data.mean and data.std"),
        ({"pretrained": "x.pth"}, "pretrained: .*use model.checkpoint"),
        ({"test_cfg": {"mode": "slide", "crop_size": (8, 8), "stride": (9, 8)}}, "strides up to the crop's size"),
        ({"test_cfg": {"mode": "slid"}}, "test_cfg=.*has to be"),
        ({"test_cfg": {"mode": "slide", "crop_size": 64, "stride": 43}}, "test_cfg=.*has to be"),
        (
            {"decode_head": {"type": "PointHead", "in_channels": [24], "in_index": [1], "channels": 8}},
            "PointHead has a loss",
        ),
        (
            {"decode_head": SETTINGS["decode_head"] | {"norm_cfg": {"type": "BN", "momentum": None}}},
            "batch norm has .*momentum",
        ),
        ({"backbone": SETTINGS["backbone"] | {"num_layers": 5}}, "make num_layers=3, or tap block 4"),
        ({"test_cfg": None}, "test_cfg=.*has to be"),
        ({"decode_head": SETTINGS["decode_head"] | {"out_channels": 1, "threshold": 0.3}}, "out_channels"),
        ({"decode_head": SETTINGS["decode_head"] | {"sampler": {"type": "OHEMPixelSampler"}}}, "has a sampler"),
        ({"backbon": {}}, "backbon"),
        ({"backbone": {"type": "mmseg.VisionTransformer"}}, "'TimmVisionTransformer' takes the same arguments"),
        ({"backbone": SETTINGS["backbone"] | {"pretrained": "x.pth"}}, "backbone.pretrained: .*use model.checkpoint"),
        ({"backbone": SETTINGS["backbone"] | {"init_cfg": {"type": "Pretrained"}}}, "backbone.init_cfg: .*checkpoint"),
    ],
)
def test_what_mmseg_or_the_engines_would_refuse_later_is_refused_now(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        make_segmentor(**changes)
    assert str(raised.value).count("config: ") <= 1


def test_mlas_neck_is_part_of_the_head() -> None:
    neck = {"type": "MLANeck", "in_channels": [24] * 4, "out_channels": 8, "norm_cfg": {"type": "SyncBN"}}
    head = {"type": "SETRMLAHead", "in_channels": [8] * 4, "channels": 16, "in_index": (0, 1, 2, 3), "mla_channels": 4}
    head |= {"norm_cfg": {"type": "SyncBN"}, "dropout_ratio": 0, "align_corners": False}
    backbone = SETTINGS["backbone"] | {"num_layers": 4, "out_indices": (0, 1, 2, 3)}
    model = make_segmentor(backbone=backbone, neck=neck, decode_head=head, auxiliary_head=None).eval()
    inventory = take_inventory(model)
    assert {name.split(".")[0] for name in inventory.head} == {"neck", "decode_head"}
    assert {name.split(".")[0] for name in head_buffers(model)} == {"neck", "decode_head"}
    images_BCHW, labels_BHW = make_batch()
    losses_B = sample_losses(model)(model(images_BCHW), labels_BHW)
    torch.testing.assert_close(losses_B.mean(), mmseg_loss(model, images_BCHW, labels_BHW))


def test_without_mmseg_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("segmentor", "vit_backbone"):
        monkeypatch.delitem(sys.modules, f"spt_dist.models.{module}")
    for module in ("mmseg", "mmseg.models", "mmseg.registry"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"needs mmseg, which is not installed: pip install 'spt_dist\[segmentation\]'"):
        make_segmentor()


def test_checkpointing_reaches_the_backbone() -> None:
    model = make_segmentor()
    assert isinstance(model, Segmentor)
    model.set_grad_checkpointing(True)
    images_BCHW, labels_BHW = make_batch()
    model.eval()
    model.per_image_losses(model(images_BCHW), labels_BHW).sum().backward()
    gradient = model.get_parameter("backbone.blocks.0.mlp.fc1.weight").grad
    plain = make_segmentor().eval()
    sample_losses(plain)(plain(images_BCHW), labels_BHW).sum().backward()
    torch.testing.assert_close(gradient, plain.get_parameter("backbone.blocks.0.mlp.fc1.weight").grad)
    assert model.backbone.grad_checkpointing
