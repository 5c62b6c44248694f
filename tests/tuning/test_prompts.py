"""Prompts against forwards written with timm's own functions.

Shape suffixes: B samples, T tokens, P prompts, D width.
"""

import copy
import pickle

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spt_dist import Plan, UserError, inject, merge, trainable_parameters
from spt_dist.allocation.kinds import ModuleOptions
from spt_dist.tuning.prompts import Prompts
from tests.models_for_tests import make_samples, make_vit
from tests.tuning.plans_for_tests import disturb, make_images, make_model

WIDTH, DEPTH, TOKENS = 24, 3, 5
IMAGES, LABELS = make_samples(4)


def plan_prompts(*blocks: int, rank: int = 3, modules: ModuleOptions | None = None, width: int = WIDTH) -> Plan:
    """Prompts in some blocks."""
    names = {f"blocks.{block}": (width,) for block in blocks}
    return Plan(
        matrices=dict.fromkeys(names, "prompt"),
        shapes=dict(names),
        rank=rank,
        modules=modules or ModuleOptions(),
        backbone_size=1,
    )


def prompted(*blocks: int, rank: int = 3, **kwargs: object) -> nn.Module:
    """A ViT of three blocks with moved prompts in some of them."""
    tuned = inject(make_vit(depth=DEPTH, **kwargs), plan_prompts(*blocks, rank=rank))
    disturb(tuned)
    return tuned


def prompts_of(model: nn.Module) -> dict[int, Tensor]:
    """Block -> its ``(P, D)`` prompts."""
    found = {int(name.split(".")[1]): p for name, p in model.named_parameters() if name.endswith(".prompts.tokens")}
    return {block: tokens.detach().clone() for block, tokens in found.items()}


def forward_with(plain: nn.Module, images: Tensor, prompts: dict[int, Tensor]) -> Tensor:
    """A plain model's forward with the prompts put behind a block's tokens, and what it makes of them left out."""
    x_BTD = plain.norm_pre(plain.patch_drop(plain._pos_embed(plain.patch_embed(images))))
    for number, block in enumerate(plain.blocks):
        num_tokens = x_BTD.shape[1]
        if number in prompts:
            repeated = torch.stack([prompts[number]] * len(images))
            x_BTD = torch.cat([x_BTD, repeated], dim=1)
        x_BTD = block(x_BTD)[:, :num_tokens]
    return plain.forward_head(plain.norm(x_BTD))


def vpt_deep(plain: nn.Module, images: Tensor, prompts: dict[int, Tensor]) -> Tensor:
    """VPT: prompts behind the class token before the first block, and other ones in their place before each block."""
    x_BTD = plain._pos_embed(plain.patch_embed(images))
    num_prompts = len(prompts[0])
    x_BTD = torch.cat([x_BTD[:, :1], prompts[0].expand(len(images), -1, -1), x_BTD[:, 1:]], dim=1)
    for number, block in enumerate(plain.blocks):
        repeated = prompts[number].expand(len(images), -1, -1)
        x_BTD = block(torch.cat([x_BTD[:, :1], repeated, x_BTD[:, 1 + num_prompts :]], dim=1))
    return plain.head(plain.norm(x_BTD)[:, 0])


def test_only_a_prompted_block_sees_more_tokens() -> None:
    tuned = prompted(0, 2)
    seen: dict[str, int] = {}
    for name, module in tuned.named_modules():
        if name.endswith((".norm1", ".norm2", ".attn", ".mlp.fc2", "norm")):
            module.register_forward_hook(lambda _, inputs, __, name=name: seen.update({name: inputs[0].shape[1]}))
        if isinstance(module, timm.models.vision_transformer.Block):
            module.register_forward_hook(lambda _, __, outputs, name=name: seen.update({name: outputs.shape[1]}))
    tuned(IMAGES)
    for block in range(DEPTH):
        inside = TOKENS + (3 if block in (0, 2) else 0)
        assert {seen[f"blocks.{block}.{part}"] for part in ("norm1", "attn", "norm2", "mlp.fc2")} == {inside}
        assert seen[f"blocks.{block}"] == TOKENS
    assert seen["norm"] == TOKENS


@pytest.mark.parametrize("blocks", [(0,), (1,), (2,), (0, 1), (0, 1, 2)])
def test_outputs_are_those_of_a_forward_by_hand(blocks: tuple[int, ...]) -> None:
    tuned = prompted(*blocks)
    prompts = prompts_of(tuned)
    assert tuple(prompts) == blocks
    wanted = forward_with(make_vit(depth=DEPTH), IMAGES, prompts)
    assert torch.allclose(tuned(IMAGES), wanted, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(tuned(IMAGES), make_vit(depth=DEPTH)(IMAGES), rtol=1e-2)


@pytest.mark.parametrize("kwargs", [{"reg_tokens": 2}, {"global_pool": "avg"}, {"init_values": 0.1, "qk_norm": True}])
def test_other_vits_take_prompts(kwargs: dict[str, object]) -> None:
    tuned = prompted(0, 2, **kwargs)
    wanted = forward_with(make_vit(depth=DEPTH, **kwargs), IMAGES, prompts_of(tuned))
    assert torch.allclose(tuned(IMAGES), wanted, rtol=1e-5, atol=1e-6)


def test_blocks_with_their_norms_behind_take_prompts() -> None:
    """Of timm's ViT blocks these begin with the attention, whose weight is no block's width."""
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2}
    model = timm.create_model("vit_base_patch16_rpn_224", num_classes=10, **sizes).eval()
    plain = copy.deepcopy(model)
    tuned = inject(model, plan_prompts(0, 2))
    wanted = forward_with(plain, IMAGES, prompts_of(tuned))
    assert torch.allclose(tuned(IMAGES), wanted, rtol=1e-5, atol=1e-6)


def test_prompts_in_all_blocks_are_vpt_deep() -> None:
    tuned = prompted(0, 1, 2)
    wanted = vpt_deep(make_vit(depth=DEPTH), IMAGES, prompts_of(tuned))
    assert torch.allclose(tuned(IMAGES), wanted, rtol=1e-5, atol=1e-6)


def test_the_order_of_prompts_does_not_matter_but_their_presence_does() -> None:
    tuned = prompted(1)
    outputs = tuned(IMAGES).detach()
    tokens = tuned.get_parameter("blocks.1.prompts.tokens")
    tokens.data = tokens.data[[2, 0, 1]]
    assert torch.allclose(tuned(IMAGES), outputs, rtol=1e-5, atol=1e-6)
    tokens.data.zero_()
    assert (tuned(IMAGES) - make_vit(depth=DEPTH)(IMAGES)).abs().max() > 1e-3, "zeros are attended to"


def test_gradients_are_those_of_a_forward_by_hand() -> None:
    tuned = prompted(0, 2).double()
    leaves = {block: tokens.requires_grad_() for block, tokens in prompts_of(tuned).items()}
    F.cross_entropy(tuned(IMAGES.double()), LABELS).backward()
    F.cross_entropy(forward_with(make_vit(depth=DEPTH).double(), IMAGES.double(), leaves), LABELS).backward()
    for block, tokens in leaves.items():
        found = tuned.get_parameter(f"blocks.{block}.prompts.tokens").grad
        assert tokens.grad.abs().max() > 0
        assert torch.allclose(found, tokens.grad, rtol=1e-9, atol=1e-12)
    assert {name for name, _ in trainable_parameters(tuned)} == {f"blocks.{block}.prompts.tokens" for block in (0, 2)}


def test_prompts_start_as_in_vpt_or_as_everything_else_in_the_released_code() -> None:
    bound = (6 / (3 * 16 * 16 + 768)) ** 0.5
    drawn = Prompts(100, 768).tokens.detach()
    assert 0.999 * bound < float(drawn.abs().max()) <= bound == 0.0625
    assert float(drawn.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    normal = Prompts(100, 768, "normal").tokens.detach()
    assert float(normal.std()) == pytest.approx(0.02, rel=0.02)
    assert float(normal.abs().max()) > 0.07


def test_dropout_is_for_training_only() -> None:
    tuned = inject(make_vit(depth=DEPTH), plan_prompts(1, modules=ModuleOptions(dropout=0.5)))
    plain, prompts = make_vit(depth=DEPTH), prompts_of(tuned)
    assert torch.allclose(tuned(IMAGES), forward_with(plain, IMAGES, prompts), rtol=1e-5, atol=1e-6)
    seen = []
    tuned.get_submodule("blocks.1.norm1").register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0][:, TOKENS:])
    )
    tuned.train()
    tuned(IMAGES)
    kept = seen[0] != 0
    assert 0 < kept.double().mean() < 1
    assert not torch.equal(kept[0], kept[1]), "as in VPT, each sample drops its own"
    assert torch.allclose(seen[0][kept], 2 * prompts[1].expand_as(kept)[kept])


def test_masks_that_do_not_know_of_prompts_are_refused() -> None:
    tuned = inject(make_vit(depth=DEPTH), plan_prompts(1))
    with pytest.raises(UserError, match="this model masks its attention"):
        tuned.forward_features(IMAGES, attn_mask=torch.zeros(TOKENS, TOKENS))


@pytest.mark.parametrize("kind", ["windows", "convolutions"])
def test_other_models_are_refused(kind: str) -> None:
    model, images = make_model(kind), make_images(kind)[0]
    wanted = model(images)
    name, width = {"windows": ("layers.0.blocks.0", 24), "convolutions": ("stages.0.blocks.0", 8)}[kind]
    block = type(model.get_submodule(name)).__name__
    plan = Plan(matrices={name: "prompt"}, shapes={name: (width,)}, backbone_size=1)
    message = f'plan: prompts for {name}, which is a {block}; structured="prompt" works with the blocks of timm\'s Vis'
    with pytest.raises(UserError, match=message):
        inject(model, plan)
    assert torch.equal(model(images), wanted)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_wrong_blocks_and_widths_are_refused() -> None:
    model = make_vit(depth=DEPTH)
    with pytest.raises(UserError, match=r"prompts for blocks.9, which is not in this model"):
        inject(model, plan_prompts(9))
    with pytest.raises(UserError, match=r"prompts for blocks.0 have width \(25,\), this model's blocks \(24,\)"):
        inject(model, plan_prompts(0, 1, width=25))
    assert torch.equal(model(IMAGES), make_vit(depth=DEPTH)(IMAGES))
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.blocks)


def test_copies_and_pickles_are_independent() -> None:
    tuned = prompted(0, 2)
    outputs = tuned(IMAGES).detach()
    for again in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned)), copy.deepcopy(copy.deepcopy(tuned))):
        assert torch.equal(again(IMAGES), outputs)
        tokens = again.get_parameter("blocks.2.prompts.tokens")
        tokens.data += 1
        changed = forward_with(make_vit(depth=DEPTH), IMAGES, prompts_of(again))
        assert torch.allclose(again(IMAGES), changed, rtol=1e-5, atol=1e-6), "the copy uses its own prompts"
        assert not torch.allclose(changed, outputs)
        assert torch.equal(tuned(IMAGES), outputs), "and the original its own"
        again.zero_grad()
        again(IMAGES).sum().backward()
        assert tokens.grad is not None
        assert tuned.get_parameter("blocks.2.prompts.tokens").grad is None


def test_detaching_leaves_nothing_behind() -> None:
    """Hooks of others stay, those of prompts go, in a copy of the model too."""
    plain = make_vit(depth=DEPTH)
    wanted = plain(IMAGES)
    for tuned in (prompted(0, 2), copy.deepcopy(prompted(0, 2)), pickle.loads(pickle.dumps(prompted(0, 2)))):
        calls: list[str] = []
        tuned.blocks[2].register_forward_hook(lambda *_, calls=calls: calls.append("other"))
        for number in (0, 2):
            tuned.blocks[number].prompts.detach(tuned.blocks[number])
        assert torch.equal(tuned(IMAGES), wanted)
        assert calls == ["other"]
        assert [len(block._forward_hooks) for block in tuned.blocks] == [0, 0, 1]
        assert not any(block._forward_pre_hooks for block in tuned.blocks)
        assert list(tuned.state_dict()) == list(plain.state_dict())


def test_prompts_stay_when_the_rest_is_merged() -> None:
    plan = plan_prompts(0, 2)
    plan.matrices["blocks.0.mlp.fc1.weight"] = "lora"
    plan.shapes["blocks.0.mlp.fc1.weight"] = (4 * WIDTH, WIDTH)
    tuned = inject(make_vit(depth=DEPTH), plan)
    disturb(tuned)
    merged = merge(tuned)
    assert torch.allclose(merged(IMAGES), tuned(IMAGES), rtol=1e-4, atol=1e-5)
    assert sorted(merged.spt_plan.matrices) == ["blocks.0", "blocks.2"]
    assert [len(block._forward_hooks) for block in merged.blocks] == [1, 0, 1]


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        tuned = prompted(0, 2).train()
        tuned.set_grad_checkpointing(checkpointing)
        F.cross_entropy(tuned(IMAGES), LABELS).backward()
        gradients.append([parameter.grad for _, parameter in trainable_parameters(tuned)])
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])
    for mine, other in zip(*gradients, strict=True):
        assert torch.allclose(mine, other, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_prompts_take_the_dtype_of_the_tokens(dtype: torch.dtype) -> None:
    tuned = inject(make_vit(depth=DEPTH).to(dtype), plan_prompts(0, 2))
    tuned(IMAGES.to(dtype)).float().sum().backward()
    tokens = tuned.get_parameter("blocks.0.prompts.tokens")
    assert tokens.dtype == tokens.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        outputs = prompted(0, 2)(IMAGES)
    assert torch.allclose(outputs.float(), prompted(0, 2)(IMAGES), rtol=0.1, atol=0.2)
