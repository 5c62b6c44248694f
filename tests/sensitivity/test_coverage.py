"""The inventory of a model that has no values, against a scoring pass of the same model with values."""

import pytest
import timm
import torch
from torch.nn import functional as F

from spt_dist import UserError, estimate_sensitivity
from spt_dist.models.matrices import take_inventory
from spt_dist.sensitivity.coverage import describe_coverage, find_image_shape

VIT = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_224", "beit_base_patch16_224", "vit_tiny_patch16_224"])
def test_what_is_left_out_is_found_without_values(name: str) -> None:
    model = timm.create_model(name, num_classes=5, **VIT)
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    scores = estimate_sensitivity(model, [(images, labels)], F.cross_entropy)
    with torch.device("meta"):
        empty = timm.create_model(name, num_classes=5, **VIT)
    assert describe_coverage(empty, find_image_shape(empty, VIT)) == take_inventory(model).summary(scores.info.skipped)
    assert ("left out: " in take_inventory(model).summary(scores.info.skipped)) == ("siglip" in name)


def test_stage_1_tells_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    model = timm.create_model("vit_base_patch16_siglip_224", num_classes=5, **VIT)
    estimate_sensitivity(model, [(torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))], F.cross_entropy)
    assert caplog.text.count("weights outside the head, 24 of them left out") == 1
    assert "left out: passes through attn_pool.q before it meets the samples" in caplog.text


def test_sizes_of_images() -> None:
    with torch.device("meta"):
        vit, plain = timm.create_model("vit_tiny_patch16_384"), torch.nn.Linear(2, 2)
        grey = timm.create_model("convnext_atto", in_chans=1)
    assert find_image_shape(vit, {}) == (3, 384, 384)
    assert find_image_shape(vit, {"img_size": 64}) == (3, 64, 64)
    assert find_image_shape(vit, {"img_size": (32, 64)}) == (3, 32, 64)
    assert find_image_shape(plain, {"backbone": {"img_size": (16, 48)}}) == (3, 16, 48)
    assert find_image_shape(grey, {"in_chans": 1})[0] == 1
    with pytest.raises(UserError, match="Linear: nothing says how large its images are"):
        find_image_shape(plain, {})
    with pytest.raises(UserError, match=r"does not take images of 40 x 40 pixels \(.*give model.kwargs an img_size"):
        describe_coverage(vit, (3, 40, 40))
