"""The Triton kernel: run by Triton's interpreter on a CPU, compiled for GPUs that need not be there, run on a GPU."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton has no build for this machine")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from spt_dist.sensitivity import kernels, triton_kernels  # noqa: E402
from spt_dist.sensitivity.triton_kernels import FLOAT_CONFIGS, HALF_CONFIGS, squared_gradients_kernel  # noqa: E402
from tests.sensitivity.oracle import relative_error  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CONFIGS = {"fp32": FLOAT_CONFIGS, "bf16": HALF_CONFIGS, "fp16": HALF_CONFIGS}
GUARD = 7  # scores before and after the kernel's own in their buffer: odd, so that they start unaligned


@dataclass(frozen=True)
class Case:
    """Sizes, dtype and memory layout of one call.

    ``layout``: "plain"; "transposed", tokens side by side in memory; "expanded", one gradient for all tokens as
    ``sum()`` leaves it; "spread", a part of larger tensors, which hold NaN outside of it.
    """

    B: int = 3
    T: int = 37
    I: int = 40  # noqa: E741
    O: int = 50  # noqa: E741
    dtype: str = "fp32"
    layout: str = "plain"

    def __str__(self) -> str:
        return "-".join(map(str, (self.B, self.T, self.I, self.O, self.dtype, self.layout)))

    def make(self) -> tuple[Tensor, Tensor, Tensor]:
        """A buffer with the scores in its middle, the inputs and the gradients."""
        generator = torch.Generator().manual_seed(self.B + 10 * self.T + 1000 * self.I + self.O)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(DTYPES[self.dtype])

        buffer = torch.rand(self.O * self.I + 2 * GUARD, generator=generator)
        if self.layout == "transposed":
            return buffer, draw(self.B, self.I, self.T).mT, draw(self.B, self.O, self.T).mT
        inputs_BTI = draw(self.B, self.T, self.I)
        if self.layout == "expanded":
            return buffer, inputs_BTI, draw(self.B, 1, self.O).expand(-1, self.T, -1)
        if self.layout == "spread":
            return buffer, spread(inputs_BTI), spread(draw(self.B, self.T, self.O))
        return buffer, inputs_BTI, draw(self.B, self.T, self.O)

    def scores(self, buffer: Tensor) -> Tensor:
        """The part of the buffer that the kernel changes."""
        return buffer[GUARD:-GUARD].view(self.O, self.I)


def spread(values: Tensor) -> Tensor:
    """The same values, with NaN behind every row and every sample."""
    larger = values.new_full([size + 3 for size in values.shape], torch.nan)
    part = larger[tuple(slice(size) for size in values.shape)]
    return part.copy_(values)


CASES = [
    Case(),
    Case(dtype="bf16"),
    Case(dtype="fp16"),
    Case(B=1, T=64, I=64, O=64),
    Case(B=1, T=1, I=1, O=1),
    Case(B=9, T=1),
    Case(B=5, T=2, I=3, O=5, dtype="bf16"),
    Case(T=33, I=33, O=31),
    Case(I=7, O=300),
    Case(I=290, O=70, B=2),
    Case(layout="transposed"),
    Case(layout="expanded"),
    Case(layout="spread"),
    Case(layout="transposed", dtype="bf16", T=16),
    Case(layout="expanded", dtype="fp16", I=17, O=15),
    Case(layout="spread", dtype="bf16", T=65, I=129, O=130),
]
RUNS = [(case, number) for case in CASES for number in range(len(CONFIGS[case.dtype]))]


def expected(case: Case) -> Tensor:
    """The whole buffer afterwards, float64: one sample at a time, by definition."""
    buffer, inputs_BTI, grads_BTO = case.make()
    buffer = buffer.double()
    for inputs_TI, grads_TO in zip(inputs_BTI.double(), grads_BTO.double(), strict=True):
        case.scores(buffer).add_(torch.einsum("ti,to->oi", inputs_TI, grads_TO).square())
    return buffer


def run_config(case: Case, number: int, device: str = "cpu") -> Tensor:
    """The whole buffer after the kernel with one of its configurations."""
    buffer, inputs_BTI, grads_BTO = (tensor.to(device) for tensor in case.make())
    config = CONFIGS[case.dtype][number]
    triton_kernels.launch(squared_gradients_kernel, case.scores(buffer), inputs_BTI, grads_BTO, **config.all_kwargs())
    return buffer.cpu()


def assert_scores(found: Tensor, case: Case, tolerance: float) -> None:
    wanted = expected(case)
    assert relative_error(found, wanted) < tolerance
    assert torch.equal(found[:GUARD], wanted[:GUARD].float())
    assert torch.equal(found[-GUARD:], wanted[-GUARD:].float())


# ------------------------------------------------------------------------------------------- the interpreter, on a CPU


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Executor]:
    """A process in which Triton interprets kernels instead of compiling them, which is settled as it is imported."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(prepare_interpreter).result()  # starts the process, in this environment
        yield pool


def prepare_interpreter() -> None:
    """One thread; and products of bf16: the interpreter knows none (github.com/triton-lang/triton/issues/11584)."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    torch.set_num_threads(1)
    create_dot = InterpreterBuilder.create_dot

    def widen(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype("uint32") << 16).view("float32"), tl.float32)

    def create_dot_of_bfloat16(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, widen(a), widen(b), *rest)

    InterpreterBuilder.create_dot = create_dot_of_bfloat16


@pytest.mark.parametrize(("case", "number"), RUNS, ids=lambda value: str(value))
def test_interpreted_kernel_equals_the_definition(interpreter: Executor, case: Case, number: int) -> None:
    found = interpreter.submit(run_config, case, number).result()
    assert_scores(found, case, tolerance=1e-6)


def test_interpreted_kernel_equals_the_portable_path(interpreter: Executor) -> None:
    case = Case(T=50, I=65, O=33)
    buffer, inputs_BTI, grads_BTO = case.make()
    kernels._add_one_by_one(case.scores(buffer), inputs_BTI, grads_BTO)
    assert relative_error(interpreter.submit(run_config, case, 0).result(), buffer.double()) < 1e-6


def run_cancelling() -> tuple[Tensor, Tensor]:
    """Scores of tokens whose gradients cancel within a sample, and of samples whose gradients cancel."""
    inputs_TI, grads_TO = torch.ones(2, 20), torch.ones(2, 24)
    opposite = torch.tensor([1.0, -1.0])
    results = []
    for grads_BTO in (grads_TO * opposite.view(1, 2, 1), grads_TO * opposite.view(2, 1, 1)):
        scores_OI = torch.zeros(24, 20)
        inputs_BTI = inputs_TI.expand(len(grads_BTO), -1, -1)
        triton_kernels.launch(
            squared_gradients_kernel, scores_OI, inputs_BTI, grads_BTO, **FLOAT_CONFIGS[-1].all_kwargs()
        )
        results.append(scores_OI)
    return results[0], results[1]


def test_squares_are_taken_after_the_tokens_and_before_the_samples(interpreter: Executor) -> None:
    """The tempting formulas, ``sum_bt d^2 x^2`` and ``(sum_bt d x)^2``, give 2 where 0 and 0 where 8 is right."""
    tokens, samples = interpreter.submit(run_cancelling).result()
    assert torch.equal(tokens, torch.zeros(24, 20))
    assert torch.equal(samples, torch.full((24, 20), 8.0))


def strays(case: Case) -> int:
    """How many addresses outside of the tensors' own elements the kernel reads."""
    from triton.runtime.interpreter import InterpreterBuilder

    buffer, inputs_BTI, grads_BTO = case.make()
    tensors = [case.scores(buffer), inputs_BTI, grads_BTO]
    spans = [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors]
    num_strays = 0

    def count(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        nonlocal num_strays
        num_strays += sum(
            not any(start <= at < end for start, end in spans) for at in pointers.data[mask.data].tolist()
        )
        return masked_load(self, pointers, mask, *rest)

    masked_load = InterpreterBuilder.create_masked_load
    InterpreterBuilder.create_masked_load = count
    try:
        triton_kernels.launch(squared_gradients_kernel, *tensors, **CONFIGS[case.dtype][-1].all_kwargs())
    finally:
        InterpreterBuilder.create_masked_load = masked_load
    return num_strays


@pytest.mark.parametrize("case", [Case(B=2, T=17, I=33, O=32), Case(B=2, T=17, I=32, O=33)], ids=str)
def test_no_reads_outside_of_the_tensors(interpreter: Executor, case: Case) -> None:
    """On a GPU they would be illegal memory accesses; the interpreter lets them pass."""
    assert interpreter.submit(strays, case).result() == 0


FAR_APART = {"samples": (2**30, 40, 1), "tokens": (40, 2**26, 1)}  # strides whose multiples leave 32 bits


def run_far_apart(case: Case, strides: tuple[int, int, int]) -> Tensor:
    """The buffer after inputs that fill little of their 4 GB; memory is only taken where it is touched."""
    buffer, inputs_BTI, grads_BTO = case.make()
    far_BTI = torch.empty(2**31 + 2000, dtype=torch.bfloat16).as_strided(inputs_BTI.shape, strides).copy_(inputs_BTI)
    triton_kernels.launch(
        squared_gradients_kernel, case.scores(buffer), far_BTI, grads_BTO, **HALF_CONFIGS[-1].all_kwargs()
    )
    return buffer


@pytest.mark.parametrize("axis", FAR_APART)
def test_offsets_of_more_than_32_bits(interpreter: Executor, axis: str) -> None:
    case = Case(B=3, T=33, dtype="bf16")
    assert_scores(interpreter.submit(run_far_apart, case, FAR_APART[axis]).result(), case, tolerance=1e-6)


def run_tuned(case: Case) -> tuple[Tensor, int]:
    """The buffer after two calls of what runs on a GPU, and the number of trials that tuning made."""
    trials = 0

    def count(call: Any, quantiles: Any) -> list[float]:
        nonlocal trials
        trials += 1
        call()
        call()
        return [float(trials)] * 3

    triton_kernels._tuned_float.do_bench = triton_kernels._tuned_half.do_bench = count
    buffer, inputs_BTI, grads_BTO = case.make()
    for _ in range(2):
        triton_kernels.add_squared_gradients(case.scores(buffer), inputs_BTI, grads_BTO)
    return buffer, trials


@pytest.mark.parametrize("dtype", DTYPES)
def test_tuning_leaves_no_trace_in_the_scores(interpreter: Executor, dtype: str) -> None:
    case = Case(dtype=dtype)
    found, trials = interpreter.submit(run_tuned, case).result()
    assert trials == len(CONFIGS[dtype])
    twice = 2 * expected(case) - case.make()[0]
    assert relative_error(found, twice) < 1e-6


# ------------------------------------------------------------------------------------- the compiler, without any device


class AbsentGPU:
    """Triton's driver for a GPU that is not there: enough to compile a launch for it."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, warp_size=32)

    def get_current_device(self) -> int:
        return self.capability  # compilations are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


class Compilation:
    """Stands for the kernel in ``launch`` and compiles it for the arguments instead of running it."""

    def __getitem__(self, grid: Any) -> Any:
        def compile_only(*args: Any, **options: Any) -> None:
            self.kernel = squared_gradients_kernel.run(*args, grid=grid, warmup=True, **options)

        return compile_only


def compile_case(case: Case, config: Any) -> Any:
    """What would run for this case."""
    buffer, inputs_BTI, grads_BTO = case.make()
    compilation = Compilation()
    triton_kernels.launch(compilation, case.scores(buffer), inputs_BTI, grads_BTO, **config.all_kwargs())
    return compilation.kernel


def bytes_spilled(cubin: bytes, folder: Path) -> int:
    """Stack of one thread, in bytes: what its registers could not hold."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(usage.split("STACK:")[1].split()[0])


@pytest.fixture
def gpu(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Compute capability of the GPU that Triton takes to be there."""
    capability: int = request.param
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", AbsentGPU(capability))
    return capability


# Shared memory of one thread block in KiB: CUDA C++ Programming Guide, technical specifications per capability.
SHARED_KIB = {80: 163, 86: 99, 90: 227, 100: 227, 120: 99}


@pytest.mark.parametrize("gpu", SHARED_KIB, indirect=True)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_configuration_fits_the_hardware(gpu: int, dtype: str, tmp_path: Path) -> None:
    for config in CONFIGS[dtype]:
        compiled = compile_case(Case(T=37, I=64, O=192, dtype=dtype), config)
        assert compiled.metadata.shared <= SHARED_KIB[gpu] * 1024, config
        assert bytes_spilled(compiled.asm["cubin"], tmp_path) <= 64, config
        # fp32 must not be rounded to TF32, which is what tensor cores would do to it.
        assert ("mma" in compiled.asm["ptx"]) == (dtype != "fp32"), config
        # Loads run ahead by all stages, over the ends of samples: two copies a stage.
        assert compiled.asm["ttgir"].count("async_copy_global_to_local") >= 2 * config.num_stages, config


@pytest.mark.parametrize("gpu", [80, 90], indirect=True)
@pytest.mark.parametrize("layout", ["plain", "transposed", "expanded", "spread"])
def test_odd_sizes_and_layouts_compile(gpu: int, layout: str) -> None:
    for dtype in DTYPES:
        compiled = compile_case(Case(I=77, O=133, dtype=dtype, layout=layout), CONFIGS[dtype][0])
        assert compiled.metadata.shared <= SHARED_KIB[gpu] * 1024


# --------------------------------------------------------------------------------------------------------------- a GPU

TOLERANCE = {"fp32": 1e-5, "bf16": 1e-4, "fp16": 1e-4}  # tensor cores truncate where they sum
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    "case", [*CASES, Case(B=4, T=197, I=770, O=1000), Case(B=4, T=197, I=768, O=3072, dtype="bf16")]
)
def test_compiled_kernel_equals_the_definition(case: Case) -> None:
    for number in range(len(CONFIGS[case.dtype])):
        assert_scores(run_config(case, number, device="cuda"), case, TOLERANCE[case.dtype])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_uses_the_kernel(dtype: str) -> None:
    assert kernels._fused_kernel(torch.device("cuda:0")) is triton_kernels.add_squared_gradients
    case = Case(B=4, T=50, I=192, O=576, dtype=dtype)
    buffer, inputs_BTI, grads_BTO = (tensor.cuda() for tensor in case.make())
    kernels.add_squared_gradients(case.scores(buffer), inputs_BTI, grads_BTO)
    assert_scores(buffer.cpu(), case, TOLERANCE[dtype])


# -------------------------------------------------------------------------------------------------- machines without it


def test_package_does_not_import_triton() -> None:
    code = "import sys, spt_dist; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton works here")
def test_portable_path_where_triton_cannot_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert kernels._fused_kernel.__wrapped__(torch.device("cuda:0")) is None
    assert "Triton can't run here" in caplog.text


def test_portable_path_on_gpus_without_bfloat16(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert kernels._fused_kernel.__wrapped__(torch.device("cuda:0")) is None
    assert "compute capability 8.0" in caplog.text
