"""Stage 1 against a loop over single samples in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn import functional as F

from spt_dist import Scores, UserError, estimate_sensitivity
from spt_dist.models.matrices import take_inventory
from spt_dist.sensitivity.memory import count_saved_bytes
from spt_dist.sensitivity.modes import scoring_mode
from spt_dist.sensitivity.scoring import PassOptions, ScoringPass
from tests.models_for_tests import make_samples, make_vit, pick
from tests.ranks import run_ranks
from tests.sensitivity.oracle import one_by_one, relative_error, squared_gradients

TOLERANCE = 2e-5


def dense_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss on every token, as segmentation has: mean over samples and tokens of the cross-entropy."""
    return F.cross_entropy(outputs.transpose(1, 2), targets.unsqueeze(1).expand(-1, outputs.shape[1]))


def pooled_vit() -> nn.Module:
    """A ViT whose head reads the mean of the patch tokens."""
    return make_vit(global_pool="avg", class_token=False)


def dense_vit() -> nn.Module:
    """A ViT whose head is applied to each token."""
    return make_vit(global_pool="")


def assert_scores(scores: Scores, wanted: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    """Every scored tensor agrees with the oracle; k's bias, exactly insensitive, is rounding noise on both sides."""
    top = max(float(value.max()) for value in wanted.values())
    for name in scores.names:
        expected = pick(wanted, name)
        if name.endswith("attn.k.bias"):
            assert float(scores[name].max()) < 1e-9 * top
        else:
            assert relative_error(scores[name], expected) < tolerance, name


@pytest.mark.parametrize("make_model", [make_vit, pooled_vit, dense_vit])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_scores_equal_the_one_by_one_loop(make_model: Callable[[], nn.Module], reduction: str) -> None:
    model = make_model()
    images, labels = make_samples(7)
    if make_model is dense_vit:

        def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
            losses = torch.stack([dense_loss(o[None], t[None]) for o, t in zip(outputs, targets, strict=True)])
            return {"mean": losses.mean(), "sum": losses.sum(), "none": losses}[reduction]

    else:

        def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(outputs, targets, reduction=reduction)

    scores = estimate_sensitivity(model, [(images[:4], labels[:4]), (images[4:], labels[4:])], loss_fn)
    assert scores.num_samples == 7
    assert_scores(scores, one_by_one(model, images, labels, loss_fn))


def test_dense_loss_with_its_own_mean() -> None:
    model = dense_vit()
    images, labels = make_samples(5)
    scores = estimate_sensitivity(model, [(images, labels)], dense_loss)
    assert_scores(scores, one_by_one(model, images, labels, dense_loss))


def test_squared_batch_gradients_are_something_else() -> None:
    """The tempting shortcut: square the gradient of a batch. It must not pass for per-sample squares."""
    model = make_vit()
    images, labels = make_samples(8)
    scores = estimate_sensitivity(model, [(images, labels)], F.cross_entropy)
    shortcut = squared_gradients(model, [(images, labels)], lambda o, t: F.cross_entropy(o, t, reduction="sum"))
    with pytest.raises(AssertionError):
        assert_scores(scores, shortcut, tolerance=0.05)


def test_tokens_are_no_samples() -> None:
    """The other tempting shortcut: treat each token as a sample, ``(d^2)^T (x^2)``."""
    model = dense_vit()
    images, labels = make_samples(6)
    scores = estimate_sensitivity(model, [(images, labels)], dense_loss)
    layer = model.get_submodule("blocks.1.mlp.fc1")
    seen: dict[str, Tensor] = {}
    layer.register_forward_hook(lambda _, args, output: seen.update(x=args[0].detach(), y=output))
    outputs = model(images)
    loss = sum(dense_loss(outputs[i : i + 1], labels[i : i + 1]) for i in range(6))
    (grads,) = torch.autograd.grad(loss, seen["y"])
    token_wise = grads.flatten(0, 1).square().mT @ seen["x"].flatten(0, 1).square()
    right = one_by_one(model, images, labels, dense_loss)["blocks.1.mlp.fc1.weight"]
    assert relative_error(scores["blocks.1.mlp.fc1.weight"], right) < TOLERANCE
    assert relative_error(scores["blocks.1.mlp.fc1.weight"], token_wise.double()) > 0.05


def test_batch_criterion_squares_the_mean_gradient_of_each_batch() -> None:
    model = make_vit()
    images, labels = make_samples(8)
    batches = [(images[:4], labels[:4]), (images[4:], labels[4:])]
    for loss_fn in (F.cross_entropy, lambda o, t: F.cross_entropy(o, t, reduction="sum")):
        scores = estimate_sensitivity(model, batches, loss_fn, criterion="batch")
        assert_scores(scores, squared_gradients(model, batches, F.cross_entropy))


def test_key_bias_is_insensitive() -> None:
    """Softmax does not change when every key is shifted alike, so k's bias has no influence at all."""
    model = make_vit()
    images, labels = make_samples(4)
    wanted = one_by_one(model, images, labels, F.cross_entropy)
    scores = estimate_sensitivity(model, [(images, labels)], F.cross_entropy)
    for block in range(2):
        _, k, v = wanted[f"blocks.{block}.attn.qkv.bias"].chunk(3)
        assert float(k.max()) < 1e-20 * float(v.max())
        found = scores[f"blocks.{block}.attn.k.bias"]
        assert float(found.max()) < 1e-9 * float(scores[f"blocks.{block}.attn.v.bias"].max())


def test_micro_batches_change_nothing() -> None:
    model = make_vit()
    images, labels = make_samples(7)
    whole = estimate_sensitivity(model, [(images, labels)], F.cross_entropy)
    split = estimate_sensitivity(model, [(images, labels)], F.cross_entropy, micro_batch=3)
    assert split.num_samples == 7
    for name in whole.names:
        if not name.endswith("k.bias"):
            assert relative_error(split[name], whole[name].double()) < TOLERANCE


def test_layers_that_work_in_place_are_followed() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 9), nn.ReLU(inplace=True), nn.Linear(9, 9), nn.ReLU(inplace=True), nn.Linear(9, 4)]
    model = nn.Sequential(*layers)
    inputs, targets = torch.randn(5, 6), torch.randint(4, (5,))
    scores = estimate_sensitivity(model, [(inputs, targets)], F.cross_entropy)
    assert_scores(scores, one_by_one(model, inputs, targets, F.cross_entropy))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.layers.config._USE_REENTRANT_CKPT", reentrant)
    model = make_vit(init_values=0.1)
    images, labels = make_samples(6)
    wanted = one_by_one(model, images, labels, F.cross_entropy)
    model.set_grad_checkpointing(True)  # type: ignore[operator]
    scores = estimate_sensitivity(model, [(images, labels)], F.cross_entropy)
    assert_scores(scores, wanted)
    # Through a reentrant checkpoint the first forward pass has no graph in which a gamma could be followed.
    assert list(scores.info.skipped) == (list(filter(is_gamma, wanted)) if reentrant else [])


def is_gamma(name: str) -> bool:
    """Whether it is the parameter of a layer scale."""
    return name.endswith("gamma")


def test_checkpoint_wrappers_leave_names_alone() -> None:
    model = make_vit(init_values=0.1)
    images, labels = make_samples(4)
    wanted = one_by_one(model, images, labels, F.cross_entropy)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    scores = estimate_sensitivity(model, [(images, labels)], F.cross_entropy)
    assert "blocks.0.attn.q.weight" in scores.names
    assert_scores(scores, wanted)


def test_checkpointed_layers_keep_no_inputs() -> None:
    """The input of a layer is kept as autograd keeps tensors: under a checkpoint it is not."""
    kept = {}
    for checkpointing in (False, True):
        model = make_vit(depth=6)
        model.set_grad_checkpointing(checkpointing)  # type: ignore[operator]
        images, labels = make_samples(8)
        scoring = ScoringPass(
            model, take_inventory(model), F.cross_entropy, PassOptions(True, None, False, None), torch.device("cpu")
        )
        with scoring_mode(model, False), scoring.attached():
            scoring.observe(images[:1], labels[:1], lambda name, scores: None)
            kept[checkpointing] = count_saved_bytes(scoring, images, labels)
    assert kept[True] < 0.2 * kept[False]


def test_memory_limit_splits_batches() -> None:
    model = make_vit()
    images, labels = make_samples(12)
    sizes: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    limited = estimate_sensitivity(model, [(images, labels)], F.cross_entropy, memory_limit=400_000)
    handle.remove()
    whole = estimate_sensitivity(model, [(images, labels)], F.cross_entropy)
    # One sample is measured and scored, the others go in equal parts of what fits.
    assert sizes[:2] == [1, 1]
    assert 1 < sizes[2] < 11
    assert sum(sizes) == 13
    for name in whole.names:
        if not name.endswith("k.bias"):
            assert relative_error(limited[name], whole[name].double()) < TOLERANCE


def test_the_model_is_left_as_it_was() -> None:
    model = make_vit().train()
    model.get_parameter("pos_embed").requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, labels = make_samples(3)
    estimate_sensitivity(model, [(images, labels)], F.cross_entropy)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["pos_embed"]
    assert not any(module._forward_hooks for module in model.modules())


def test_dropout_is_off_unless_asked_for() -> None:
    model = make_vit(proj_drop_rate=0.5)
    images, labels = make_samples(4)
    first = estimate_sensitivity(model, [(images, labels)], F.cross_entropy)
    again = estimate_sensitivity(model, [(images, labels)], F.cross_entropy)
    noisy = estimate_sensitivity(model, [(images, labels)], F.cross_entropy, train_mode=True)
    name = "blocks.0.mlp.fc2.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.allclose(first[name], noisy[name])


def test_what_the_scores_are_is_told_with_them() -> None:
    scores = estimate_sensitivity(make_vit(), [make_samples(2)], F.cross_entropy)
    assert not scores.info.skipped
    assert scores.info.head == ["head.weight", "head.bias"]
    assert scores.info.always_tuned == {"cls_token": [1, 1, 24]}
    assert not set(scores.names) & {"head.weight", "head.bias"}
    assert set(scores.info.matrices) == {
        f"blocks.{block}.{layer}.weight"
        for block in range(2)
        for layer in ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert scores.info.loss_reduction == "sum"
    assert (
        estimate_sensitivity(make_vit(), [make_samples(2)], F.cross_entropy, criterion="batch").info.loss_reduction
        == "mean"
    )


class Twice(nn.Module):
    """A model that uses one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 4)`` to ``(B, 4)``."""
        return self.layer(self.layer(x))


class Functional(Twice):
    """A model that applies a layer's weight without calling the layer."""

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 4)`` to ``(B, 4)``."""
        return F.linear(x, self.layer.weight)


class TokensFirst(Twice):
    """A model whose layer sees six tokens along axis 0 and the samples along axis 1."""

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 4)`` to ``(B, 4)``."""
        return self.layer(x.expand(6, *x.shape)).mean(dim=0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Twice(), "layer: called 2 times"),
        (Functional(), "layer: never called"),
        (TokensFirst(), r"layer: its input has shape \(6, 2, 4\) for 2 samples and 6 rows for one"),
        (nn.Flatten(), "no weight outside its head"),
        (nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 1)), r"1\.self_attn: nn\.MultiheadAttention"),
    ],
)
def test_models_that_would_be_scored_wrongly_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(UserError, match=message):
        estimate_sensitivity(model, [(torch.randn(3, 4), torch.randint(4, (3,)))], F.cross_entropy)


def test_bad_calls_are_refused() -> None:
    model, batch = make_vit(), make_samples(3)
    with pytest.raises(UserError, match="batches is empty"):
        estimate_sensitivity(model, [], F.cross_entropy)
    with pytest.raises(UserError, match="criterion='fisher'"):
        estimate_sensitivity(model, [batch], F.cross_entropy, criterion="fisher")
    for option in ({"micro_batch": 2}, {"memory_limit": 10**9}):
        with pytest.raises(UserError, match=next(iter(option))):
            estimate_sensitivity(model, [batch], F.cross_entropy, criterion="batch", **option)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="memory_limit=0"):
        estimate_sensitivity(model, [batch], F.cross_entropy, memory_limit=0)
    with pytest.raises(UserError, match=r"loss_fn returned shape \(1, 10\)"):
        estimate_sensitivity(model, [batch], lambda outputs, _: outputs)
    with pytest.raises(UserError, match="loss_fn returned Tensor that does not depend"):
        estimate_sensitivity(model, [batch], lambda outputs, _: outputs.detach().sum())
    with pytest.raises(UserError, match=r"has to be a pair \(inputs, targets\), not Tensor"):
        estimate_sensitivity(model, batch, F.cross_entropy)  # type: ignore[arg-type]


class TakesDict(nn.Module):
    """A model whose input is a dict, as tokenizers make it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """``batch["x"]`` ``(B, 4)`` to ``{"logits": (B, 3)}``; the layer is called by keyword."""
        return {"logits": self.layer(input=batch["x"]) * batch["scale"]}


def test_nested_inputs_and_outputs() -> None:
    torch.manual_seed(0)
    model, x, y = TakesDict(), torch.randn(5, 4), torch.randint(3, (5,))
    inputs = {"id": "a name", "scale": torch.tensor(2.0), "x": x}
    scores = estimate_sensitivity(
        model, [(inputs, y)], lambda outputs, targets: F.cross_entropy(outputs["logits"], targets), micro_batch=2
    )

    def scaled_loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(2 * outputs, targets)

    wanted = one_by_one(model.layer, x, y, scaled_loss)
    assert scores.num_samples == 5
    assert relative_error(scores["layer.weight"], wanted["weight"]) < TOLERANCE
    assert relative_error(scores["layer.bias"], wanted["bias"]) < TOLERANCE


def score_a_share(shares: list[list[int]]) -> dict[str, Tensor]:
    """Score this rank's samples and gather the result."""
    images, labels = make_samples(9)
    mine = shares[dist.get_rank()]
    batches = [(images[mine], labels[mine])] if mine else []
    scores = estimate_sensitivity(make_vit(), batches, F.cross_entropy)
    assert scores.num_samples == 9
    assert len(scores.shard.values) <= -(-scores.shard.index.total // dist.get_world_size())
    return {name: scores[name] for name in scores.names}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "shares", [[list(range(9))], [[0, 1, 2, 3, 4], [5, 6, 7, 8]], [[0, 1, 2, 3, 4, 5], [6], [], [7, 8]]]
)
def test_scores_do_not_depend_on_the_number_of_ranks(shares: list[list[int]]) -> None:
    model = make_vit()
    images, labels = make_samples(9)
    wanted = one_by_one(model, images, labels, F.cross_entropy)
    for result in run_ranks(score_a_share, len(shares), shares):
        for name, value in result.items():
            if not name.endswith("k.bias"):
                assert relative_error(value, pick(wanted, name)) < TOLERANCE, name
