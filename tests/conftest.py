"""Fixtures that all tests share."""

import pytest
import torch
from torch import nn

from tests.models_for_tests import make_vit


@pytest.fixture(autouse=True)
def _one_thread_and_fixed_seed() -> None:
    """Tiny matrices are slower on several threads, and failures have to repeat."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def vit() -> nn.Module:
    """A timm ViT with two blocks of width 24 and ten classes, in eval mode."""
    return make_vit()
