"""Parameters that models use in unusual ways: their scores are exact, or they are listed, and all others stay exact."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from spt_dist import UserError, estimate_sensitivity
from tests.sensitivity.oracle import one_by_one, relative_error

WAY = Callable[["Tokens", Tensor], Tensor]


class Tokens(nn.Module):
    """Four tokens a sample, ``(B, 4, 6)``, go through ``way`` between two layers; their mean is classified."""

    def __init__(self, way: WAY) -> None:
        super().__init__()
        self.way = way
        self.checkpoints = False
        self.first = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.side = nn.Linear(6, 6)
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.gain = nn.Parameter(torch.rand(6) + 0.5)
        self.head = nn.Linear(6, 3)

    def get_classifier(self) -> nn.Module:
        """As timm's models tell their head."""
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 4, 6)`` to ``(B, 3)``."""
        x = self.way(self, self.first(x))
        return self.head(self.side(self.norm(x)).relu().mean(dim=1) + self.token.sum() + self.gain.sum())


def add_by_keyword(m: Tokens, x: Tensor) -> Tensor:
    return torch.add(x, other=m.gain).mul(other=m.token.exp())


def cat_by_keyword(m: Tokens, x: Tensor) -> Tensor:
    return torch.cat(tensors=[m.token.expand(len(x), -1, -1), x * m.gain], dim=1)


def cat_repeated(m: Tokens, x: Tensor) -> Tensor:
    return torch.cat([m.token.repeat(len(x), 2, 1), x], 1) / m.gain


def bias_of_linear(m: Tokens, x: Tensor) -> Tensor:
    return F.linear(bias=m.gain, weight=torch.eye(6, dtype=x.dtype), input=x)


def attention_mask(m: Tokens, x: Tensor) -> Tensor:
    query = x.unsqueeze(1)
    mask = m.gain[:4] + m.gain[1:5].unsqueeze(1)
    return F.scaled_dot_product_attention(key=query, query=query, value=query, attn_mask=mask).squeeze(1)


def scalar(m: Tokens, x: Tensor) -> Tensor:
    return 2 - x * m.gain.prod() / (1 + m.token.square().sum())


def cut_and_joined(m: Tokens, x: Tensor) -> Tensor:
    x = x * m.gain
    x[:, 1:] += m.token
    return torch.cat([x[:, 2:], x[:, :2]], dim=1)


FOLLOWED: list[WAY] = [
    add_by_keyword, cat_by_keyword, cat_repeated, bias_of_linear, attention_mask, scalar, cut_and_joined,
]  # fmt: skip


def written_into(m: Tokens, x: Tensor) -> Tensor:
    filled = m.token.expand(len(x), 6, -1).clone()
    filled[:, :4] = x
    return filled


def added_into(m: Tokens, x: Tensor) -> Tensor:
    return m.token.expand(len(x), 4, -1).clone().add_(x)


def buffer_of_it(m: Tokens, x: Tensor) -> Tensor:
    buffer = torch.zeros(len(x), 5, 6, dtype=x.dtype)
    buffer[:, :1] = m.token
    buffer[:, 1:] = x
    return buffer


def chosen(m: Tokens, x: Tensor) -> Tensor:
    return torch.where(x > 0, x, m.token)


def inside_and_outside_a_checkpoint(m: Tokens, x: Tensor) -> Tensor:
    x = x * m.token
    # The oracle has no use for a checkpoint, and autograd.grad none for a reentrant one.
    y: Tensor = (
        checkpoint(lambda x: (x * m.token).tanh(), x, use_reentrant=True) if m.checkpoints else (x * m.token).tanh()
    )
    return y + m.token


class Scale(torch.autograd.Function):
    """A product that torch functions don't show."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor) -> Tensor:
        ctx.save_for_backward(x, gain)
        return x * gain

    @staticmethod
    def backward(ctx: Any, grads: Tensor) -> Any:
        x, gain = ctx.saved_tensors
        return grads * gain, (grads * x).sum_to_size(gain.shape)


def hidden(m: Tokens, x: Tensor) -> Tensor:
    result: Tensor = Scale.apply(x, m.token * 1.0)
    return result + m.token


LISTED: list[WAY] = [written_into, added_into, buffer_of_it, chosen, inside_and_outside_a_checkpoint, hidden]


def check(model: nn.Module, images: Tensor, labels: Tensor, **options: Any) -> dict[str, str]:
    """Everything scored agrees with single samples; what is not is returned."""
    wanted = one_by_one(model, images, labels, F.cross_entropy)
    if isinstance(model, Tokens):
        model.checkpoints = True
    scores = estimate_sensitivity(model, [(images, labels)], F.cross_entropy, **options)
    for name in scores.names:
        assert relative_error(scores[name], wanted[name]) < 2e-5, name
    return scores.info.skipped


def make_task(way: WAY) -> tuple[nn.Module, Tensor, Tensor]:
    """A model and five samples."""
    torch.manual_seed(0)
    return Tokens(way), torch.randn(5, 4, 6), torch.randint(3, (5,))


@pytest.mark.parametrize("micro_batch", [None, 1])
@pytest.mark.parametrize("way", FOLLOWED, ids=lambda way: way.__name__)
def test_followed_exactly(way: WAY, micro_batch: int | None) -> None:
    assert not check(*make_task(way), micro_batch=micro_batch)


@pytest.mark.parametrize("way", LISTED, ids=lambda way: way.__name__)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_listed_and_no_other_score_is_touched(way: WAY) -> None:
    assert list(check(*make_task(way))) == ["token"]


class Embedded(nn.Module):
    """Words and positions, both without gradients until the first layer, and a residual around it."""

    def __init__(self, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.words = nn.Embedding(7, 6)
        self.positions = nn.Parameter(torch.randn(1, 4, 6))
        self.norm = nn.LayerNorm(6)
        self.layer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 4)`` int64 to ``(B, 3)``."""
        x = self.words(x) + self.positions
        x = self.layer(self.norm(x)).relu() + (x if self.residual else 0)
        return self.head(x.mean(dim=1))


@pytest.mark.parametrize("residual", [True, False])
def test_parameters_before_the_first_layer_are_listed(residual: bool) -> None:
    torch.manual_seed(0)
    words, labels = torch.randint(7, (5, 4)), torch.randint(3, (5,))
    skipped = check(Embedded(residual), words, labels)
    assert skipped == dict.fromkeys(("positions", "words.weight"), "passes through norm before it meets the samples")


class SequenceFirst(nn.Module):
    """Tokens along axis 0, samples along axis 1."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.token = nn.Parameter(torch.randn(1, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 4, 6)`` to ``(B, 6)``."""
        x = self.first(x).transpose(0, 1)
        return torch.cat([self.token.expand(-1, x.shape[1], -1), x], 0).square().mean(dim=0)


def test_joining_along_the_axis_of_samples_is_refused_or_exact() -> None:
    torch.manual_seed(0)
    model, x, y = SequenceFirst(), torch.randn(5, 4, 6), torch.randint(6, (5,))
    with pytest.raises(UserError, match="token: no rule for its use in cat, and not so in the first forward pass"):
        estimate_sensitivity(model, [(x, y)], F.cross_entropy)
    assert not check(model, x, y, micro_batch=1)


def test_parameters_of_a_layer_that_its_rule_does_not_know() -> None:
    torch.manual_seed(0)
    normed = nn.utils.weight_norm(nn.Linear(6, 6))  # type: ignore[no-untyped-call]
    # What it computes before each call can't be copied as long as it has a graph.
    normed.__dict__["weight"] = normed.weight.detach()
    model = nn.Sequential(nn.Linear(6, 6), normed, nn.Linear(6, 3))
    skipped = check(model, torch.randn(5, 6), torch.randint(3, (5,)))
    assert skipped == dict.fromkeys(("1.weight_g", "1.weight_v"), "no rule for its use in linear")


class Reused(nn.Module):
    """A layer that is called, and its weight that a function uses too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 6)`` to ``(B, 6)``."""
        return F.linear(self.layer(x), self.layer.weight)


def test_a_weight_that_is_used_beside_its_layer_is_refused() -> None:
    with pytest.raises(UserError, match=r"layer\.weight: used functionally as well as by its layer's call"):
        check(Reused(), torch.randn(5, 6), torch.randint(6, (5,)))


def test_qkv_that_is_called_is_scored() -> None:
    """timm's EVA with rotary positions and no bias has an empty ``q_bias`` and calls its layer."""
    torch.manual_seed(0)
    kwargs: dict[str, Any] = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_small_patch16_dinov3", num_classes=5, **kwargs).eval()
    images, labels = torch.randn(3, 3, 32, 32), torch.randint(5, (3,))
    scores = estimate_sensitivity(model, [(images, labels)], F.cross_entropy)
    wanted = one_by_one(model, images, labels, F.cross_entropy)["blocks.1.attn.qkv.weight"].chunk(3)
    for letter, expected in zip("qkv", wanted, strict=True):
        assert relative_error(scores[f"blocks.1.attn.{letter}.weight"], expected) < 2e-5
