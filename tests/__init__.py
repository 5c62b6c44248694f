"""Tests; mirrors spt_dist."""

# Before anything imports timm: it makes torchvision importable beside a CPU torch.
import spt_dist  # noqa: F401
