"""What a config may say about normalisation."""

from typing import Any

import pytest
from timm.data import constants

from spt_dist import UserError
from spt_dist.normalisation import NORMALISATIONS, read_normalisation


def test_the_names_mean_what_timm_means_by_them() -> None:
    wanted = {
        "imagenet": (constants.IMAGENET_DEFAULT_MEAN, constants.IMAGENET_DEFAULT_STD),
        "inception": (constants.IMAGENET_INCEPTION_MEAN, constants.IMAGENET_INCEPTION_STD),
        "clip": (constants.OPENAI_CLIP_MEAN, constants.OPENAI_CLIP_STD),
        "none": ((0, 0, 0), (1, 1, 1)),
    }
    assert {name: (found.mean, found.std) for name, found in NORMALISATIONS.items()} == wanted


def test_what_is_read_knows_where_it_comes_from() -> None:
    named = read_normalisation("data.normalize", "clip")
    assert (named.name, named.source) == ("clip", "data.normalize")
    assert str(named) == "clip, mean 0.4815 0.4578 0.4082, deviation 0.2686 0.2613 0.2758 (data.normalize)"
    own = read_normalisation("model.normalize", {"mean": [0.1, 0, 1], "std": (0.5, 1, 0.25)})
    assert (own.name, own.mean, own.std) == ("own values", (0.1, 0.0, 1.0), (0.5, 1.0, 0.25))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("imagnet", r"model\.normalize='imagnet' is unknown; known: 'imagenet', 'inception', 'clip', 'none', or dict"),
        (0.5, r"model\.normalize=0\.5 has to be a name, or a dict of exactly mean and std"),
        ({"mean": [0.5] * 3}, r"a dict of exactly mean and std"),
        ({"mean": [0.5] * 3, "std": [0.5] * 3, "to_rgb": True}, r"a dict of exactly mean and std"),
        ({"mean": [0.5] * 2, "std": [0.5] * 3}, r"model\.normalize\.mean=\[0\.5, 0\.5\] has to be three numbers"),
        ({"mean": 0.5, "std": [0.5] * 3}, r"model\.normalize\.mean=0\.5 has to be three numbers"),
        ({"mean": [0.5] * 3, "std": [0.5, 0.5, "x"]}, r"model\.normalize\.std=.* has to be three numbers"),
        ({"mean": [0.5] * 3, "std": [0.5, 0.5, float("nan")]}, r"model\.normalize\.std=.* has to be three numbers"),
        ({"mean": [0.5] * 3, "std": [0.5, 0.5, True]}, r"model\.normalize\.std=.* has to be three numbers"),
        ({"mean": [0.5] * 3, "std": [0.5, 0.5, 0]}, r"a deviation is above 0"),
        ({"mean": [123.7, 116.3, 103.5], "std": [58.4, 57.1, 57.4]}, r"white is 1 here; divide by 255"),
    ],
)
def test_mistakes_are_told(value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_normalisation("model.normalize", value)
