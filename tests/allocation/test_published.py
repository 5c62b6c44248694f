"""Reading published allocations: files written here as the published code wrote them, good, damaged and hostile."""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from spt_dist import Plan, UserError, inject, merge, trainable_parameters
from spt_dist.allocation.kinds import ModuleOptions, structured_cost
from tests.allocation.published_files import NAMES, OPERATIONS, SOME, Release, numel, write
from tests.models_for_tests import pick


@pytest.mark.parametrize("kind", ["lora", "adapter"])
def test_everything_is_read(tmp_path: Path, kind: str) -> None:
    release = Release(kind, SOME.matrices, SOME.vectors, SOME.sparse)
    plan = Plan.from_spt_release(write(tmp_path / "some.pth", release.content()))
    assert plan.matrices == dict.fromkeys(release.matrix_names, kind)
    assert plan.vectors == SOME.vectors
    assert {name: indices.tolist() for name, indices in plan.sparse.items()} == SOME.sparse
    assert (plan.parameters, plan.head) == (["cls_token"], ["head.weight", "head.bias"])
    assert (plan.rank, plan.method, plan.num_in_place) == (8, f"spt-{kind}", 768)
    assert all(plan.shapes[name] == NAMES[name] for name in (*plan.matrices, *plan.vectors, *plan.sparse))
    # By hand: four 768 x 768 matrices, fc1 and fc2; three vectors of 768 and one of 3072; 18 entries.
    matrices = {"lora": 4 * 12_288 + 2 * 30_720, "adapter": 4 * 13_064 + 52_232 + 13_064}[kind]
    assert plan.num_trainable == matrices + 3 * 768 + 3_072 + 18 + 768
    path = tmp_path / "plan.safetensors"
    plan.save(path)
    assert Plan.load(path).summary() == plan.summary()


def test_written_by_numpy_2(tmp_path: Path) -> None:
    """The name under which numpy's scalars are pickled has changed since."""
    torch.save(SOME.content(), tmp_path / "new.pth")
    assert Plan.from_spt_release(tmp_path / "new.pth").num_sparse == 18


def test_nothing_structured(tmp_path: Path) -> None:
    """Without a matrix the file is the same for either kind."""
    release = Release(vectors=SOME.vectors, sparse=SOME.sparse)
    plan = Plan.from_spt_release(write(tmp_path / "small.pth", release.content()))
    assert (plan.matrices, plan.method, plan.num_structured) == ({}, "spt", 0)
    nothing = Plan.from_spt_release(write(tmp_path / "nothing.pth", Release().content()))
    assert nothing.num_trainable == 768


def test_the_cost_tells_the_kind() -> None:
    """No set of ViT-B/16's matrices costs as much in LoRA as in adapters."""
    square, fc1, fc2 = (768, 768), (3072, 768), (768, 3072)
    for shape, cost in ((square, 13_064), (fc1, 52_232), (fc2, 13_064)):
        assert structured_cost("adapter", shape, 8) == cost
    more = {
        shape: structured_cost("adapter", shape, 8) - structured_cost("lora", shape, 8) for shape in (square, fc1, fc2)
    }
    same = [
        (num_square, num_fc1, num_fc2)
        for num_square in range(49)
        for num_fc1 in range(13)
        for num_fc2 in range(13)
        if num_square * more[square] + num_fc1 * more[fc1] + num_fc2 * more[fc2] == 0
    ]
    assert same == [(0, 0, 0)]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_random_allocations(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever is chosen comes back, wherever the tensors without an entry are."""
    kind = data.draw(st.sampled_from(["lora", "adapter"]))
    slots = [(block, name) for block in range(12) for name in OPERATIONS]
    matrices = data.draw(st.lists(st.sampled_from(slots), unique=True, max_size=12))
    vectors = [name for name in NAMES if len(NAMES[name]) == 1]
    release = Release(kind, sorted(matrices, key=slots.index))
    release.vectors = data.draw(st.lists(st.sampled_from(vectors), unique=True, max_size=12))
    rest = [name for name in NAMES if name not in {*release.matrix_names, *release.vectors}]
    for name in data.draw(st.lists(st.sampled_from(rest), unique=True, max_size=8)):
        positions = st.integers(0, numel(name) - 1) | st.sampled_from([0, numel(name) - 1])
        release.sparse[name] = sorted(data.draw(st.sets(positions, min_size=1, max_size=5)))
    plan = Plan.from_spt_release(write(tmp_path / "random.pth", release.content()))
    assert list(plan.matrices) == release.matrix_names
    assert set(plan.matrices.values()) <= {kind}
    assert {name: indices.tolist() for name, indices in plan.sparse.items()} == release.sparse
    content = release.content()
    assert abs(plan.num_trainable - content["params"].double().item() * 1e6) < 0.1
    assert plan.num_structured + plan.num_vectors == content["structured_params"]


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("key", ["structured_params", "unstructured_name_shapes", "one more"])
def test_a_command_is_not_run(tmp_path: Path, key: str) -> None:
    """The file is otherwise in order, and a plain unpickler does run it."""
    trace = tmp_path / "trace"
    content = SOME.content() | {key: Call(os.system, f"touch {trace}")}
    path = write(tmp_path / "hostile.pth", content)
    with pytest.raises(UserError, match=r"hostile\.pth: not read, since it refers to posix\.system"):
        Plan.from_spt_release(path)
    assert not trace.exists()
    torch.load(path, map_location="cpu", weights_only=False)
    assert trace.exists()


@pytest.mark.parametrize(
    ("function", "args", "name"),
    [
        (eval, ("1",), r"__builtin__\.eval|builtins\.eval"),
        (getattr, ("a", "b"), r"__builtin__\.getattr|builtins\.getattr"),
        (np.array, ([1],), r"numpy\.array"),
        (Path, ("a",), r"pathlib.*\.Path"),
        (pickle.loads, (b"N.",), r"pickle\.loads"),
    ],
)
def test_other_functions_are_refused(tmp_path: Path, function: Any, args: tuple[Any, ...], name: str) -> None:
    path = write(tmp_path / "other.pth", SOME.content() | {"params": Call(function, *args)})
    with pytest.raises(UserError, match=rf"other\.pth: not read, since it refers to ({name})"):
        Plan.from_spt_release(path)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_bare_pickle_is_refused(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "bare.pth"
    path.write_bytes(pickle.dumps(Call(os.system, f"touch {tmp_path / 'trace'}"), protocol=protocol))
    with pytest.raises(UserError, match=r"bare\.pth: not readable as an allocation"):
        Plan.from_spt_release(path)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("number", [np.float64(1.5), np.int32(5), np.array([1])], ids=["float64", "int32", "array"])
def test_other_numpy_values_are_refused(tmp_path: Path, number: Any) -> None:
    with pytest.raises(UserError, match=r"strange\.pth: not read"):
        Plan.from_spt_release(write(tmp_path / "strange.pth", SOME.content() | {"structured_params": number}))


def test_no_trace_is_left_on_the_loader(tmp_path: Path) -> None:
    """What is allowed for these files is not allowed afterwards."""
    path = write(tmp_path / "some.pth", SOME.content())
    Plan.from_spt_release(path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, map_location="cpu", weights_only=True)


def test_truncated_and_foreign_files(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.pth", SOME.content()).read_bytes()
    contents = [b"", b"PK\x03\x04", b"no pickle at all", pickle.dumps({"a": 1}, protocol=2)]
    contents += [whole[: len(whole) * part // 10] for part in range(1, 10)]
    for content in contents:
        (tmp_path / "broken.pth").write_bytes(content)
        with pytest.raises(UserError, match=r"broken\.pth: not readable as an allocation"):
            Plan.from_spt_release(tmp_path / "broken.pth")
    with pytest.raises(UserError, match="no such file"):
        Plan.from_spt_release(tmp_path / "missing.pth")
    with pytest.raises(UserError, match="no such file"):
        Plan.from_spt_release(tmp_path)
    with pytest.raises(UserError, match="no allocation published with SPT: it holds a list"):
        Plan.from_spt_release(write(tmp_path / "list.pth", [1, 2]))
    with pytest.raises(UserError, match=r"no allocation published with SPT: it holds the keys \['head.weight'\]"):
        Plan.from_spt_release(write(tmp_path / "weights.pth", {"head.weight": torch.zeros(3)}))


def changed(**changes: Any) -> dict[str, Any]:
    """``SOME``'s content with some keys given anew, or changed by a function."""
    content = SOME.content()
    return content | {key: new(content[key]) if callable(new) else new for key, new in changes.items()}


def without(name: str) -> Any:
    return lambda value: {key: entry for key, entry in value.items() if key != name}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuned_matrices": lambda rows: rows[:-1]}, "tuned_matrices has to hold 12 lists of 6 flags"),
        ({"tuned_matrices": lambda rows: [row[:-1] for row in rows]}, "tuned_matrices has to hold 12 lists of 6"),
        ({"tuned_matrices": lambda rows: [[2] * 6, *rows[1:]]}, "tuned_matrices has to hold 12 lists of 6 flags"),
        ({"tuned_matrices": lambda rows: [[0] * 6] * 12}, "structured_params is .* but its 0 matrices and 4 vectors"),
        ({"tuned_vectors": lambda names: [*names, "blocks.12.norm1.bias"]}, "tuned_vectors has to hold the names"),
        ({"tuned_vectors": lambda names: [*names, "blocks.1.attn.q.weight"]}, "tuned_vectors has to hold the names"),
        ({"tuned_vectors": lambda names: [*names, []]}, "tuned_vectors has to hold the names"),
        ({"tuned_vectors": lambda names: ["blocks.1.norm1.bias", *names[1:]]}, "blocks.1.norm1.bias would be tuned in"),
        ({"tuned_vectors": lambda names: names[:-1]}, "structured_params is"),
        ({"structured_params": lambda count: count + 1}, "structured_params is"),
        ({"structured_params": 1.5}, "structured_params has to hold an integer"),
        ({"params": lambda value: value + 3e-6}, "params is .* million, but its parts make"),
        ({"params": torch.tensor(float("nan"))}, "params is nan"),
        ({"params": 0.4}, "params has to hold one float32 number"),
        ({"params": torch.zeros((), device="meta")}, "params has to hold one float32 number"),
        ({"unstructured_params": lambda value: value + 1}, "unstructured_params is 19, but there are 18"),
        ({"unstructured_indexes": lambda value: value[:-1]}, "unstructured_params is 18, but there are 17"),
        ({"unstructured_indexes": lambda value: value.flip(0).contiguous()}, "have to be ascending positions"),
        ({"unstructured_indexes": lambda value: value.sub(value[0] + 1)}, "have to be ascending positions"),
        ({"unstructured_indexes": lambda value: value + 80_000_000}, "have to be ascending positions"),
        ({"unstructured_indexes": lambda value: value[[0, 0, *range(2, 18)]]}, "have to be ascending positions"),
        ({"unstructured_indexes": lambda value: value.int()}, "unstructured_indexes has to hold int64 positions"),
        ({"unstructured_indexes": torch.zeros(1, dtype=torch.int64).expand(10**12)}, "has to hold int64 positions"),
        ({"unstructured_name_shapes": without("norm.bias")}, "name different weights"),
        ({"unstructured_name_shapes_int": without("norm.bias")}, "name different weights"),
        ({"unstructured_name_shapes": lambda shapes: shapes | {"norm.bias": torch.Size([384])}}, "weights of a ViT-B"),
        ({"unstructured_name_shapes_int": lambda sizes: sizes | {"norm.bias": np.int64(1)}}, "weights of a ViT-B"),
        ({"unstructured_name_shapes": lambda shapes: shapes | {3: torch.Size([384])}}, "weights of a ViT-B"),
    ],
)
def test_parts_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"damaged\.pth: .*{message}"):
        Plan.from_spt_release(write(tmp_path / "damaged.pth", changed(**changes)))


ODD = st.sampled_from(
    [
        None,
        1,
        -1.0,
        "a",
        b"a",
        [],
        {},
        (),
        [[]],
        {"a": "b"},
        torch.Size([2]),
        torch.zeros(2),
        torch.zeros(2, 2).to_sparse(),
    ]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(list(SOME.content())), odd=ODD)
def test_odd_values(tmp_path: Path, key: str, odd: Any) -> None:
    with pytest.raises(UserError, match="odd"):
        Plan.from_spt_release(write(tmp_path / "odd.pth", SOME.content() | {key: odd}))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_any_changed_byte(tmp_path: Path, place: float, byte: int) -> None:
    """A byte of the pickle that is another one gives a plan or a ``UserError``, never anything else."""
    torch.save(SOME.content(), tmp_path / "whole.pth")
    with zipfile.ZipFile(tmp_path / "whole.pth") as source, zipfile.ZipFile(tmp_path / "byte.pth", "w") as target:
        for record in source.namelist():
            data = bytearray(source.read(record))
            if record.endswith("data.pkl"):
                data[int(place * len(data))] = byte
            target.writestr(record, data)
    try:
        assert Plan.from_spt_release(tmp_path / "byte.pth").num_sparse == 18
    except UserError as error:
        assert "byte.pth" in str(error)


def test_modules_are_the_papers_or_the_published_codes(tmp_path: Path) -> None:
    path = write(tmp_path / "some.pth", SOME.content())
    assert Plan.from_spt_release(path).modules == ModuleOptions()
    assert Plan.from_spt_release(path, preset="released").modules == ModuleOptions("normal", 0.1, 0.1, ("proj",))
    with pytest.raises(UserError, match="preset='other'"):
        Plan.from_spt_release(path, preset="other")


def vit_b_with_random_weights() -> nn.Module:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=10)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.02, generator=generator)
    return model.eval()


@pytest.mark.parametrize("kind", ["lora", "adapter"])
def test_a_published_allocation_on_vit_b(tmp_path: Path, kind: str) -> None:
    """As many parameters train as the file says, and a step changes the chosen weights and no other."""
    model = vit_b_with_random_weights()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    content = Release(kind, SOME.matrices, SOME.vectors, SOME.sparse).content()
    plan = Plan.from_spt_release(write(tmp_path / "some.pth", content))
    assert plan.backbone_size == sum(value.numel() for name, value in before.items() if not name.startswith("head"))
    tuned = inject(model, plan)
    trained = dict(trainable_parameters(tuned))
    count = sum(parameter.numel() for name, parameter in trained.items() if name not in plan.head)
    assert count == plan.num_trainable == round(content["params"].double().item() * 1e6)

    optimizer = torch.optim.Adam(trained.values(), lr=1e-2)
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    F.cross_entropy(tuned(images), torch.tensor([3])).backward()
    optimizer.step()
    after = {name: value for name, value in merge(tuned).state_dict().items() if name in before}
    check_changes(plan, before, after)


def check_changes(plan: Plan, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Every weight of the model changed if it was chosen, and only then."""
    assert after.keys() == before.keys()
    others = {"cls_token": (1, 1, 768), **dict.fromkeys(plan.head, ())}
    untouched = {
        name for name in before if name not in others and "blocks" not in name and not name.startswith("norm.")
    }
    assert untouched == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert all(torch.equal(before[name], after[name]) for name in untouched)
    assert all(not torch.equal(before[name], after[name]) for name in others)
    for name in NAMES:
        moved = pick(after, name) != pick(before, name)
        if name in plan.matrices:
            # An update of a single weight may round to nothing; adapters stay beside the weights.
            assert moved.float().mean() > 0.99 if plan.matrices[name] == "lora" else not moved.any(), name
        elif name in plan.vectors:
            assert moved.all(), name
        else:
            chosen = plan.sparse[name].tolist() if name in plan.sparse else []
            assert moved.flatten().nonzero().flatten().tolist() == chosen, name
