"""Fixtures that all tests share."""

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import nn

from tests.models_for_tests import make_vit

# How long an example takes, or its drawing, says something of the machine: each pauses now and then.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")


@pytest.fixture(autouse=True)
def _one_thread_and_fixed_seed() -> None:
    """Tiny matrices are slower on several threads, and failures have to repeat."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def vit() -> nn.Module:
    """A timm ViT with two blocks of width 24 and ten classes, in eval mode."""
    return make_vit()
