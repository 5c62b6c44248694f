"""SPT for those who train with mmseg's own ``tools/train.py``: a hook for their configs.

Shape suffixes: C channels, H height, W width.
"""

import copy
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.logging import HistoryBuffer
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from mmseg.models import EncoderDecoder
from mmseg.registry import HOOKS
from torch import Tensor, nn

from spt_dist.allocation.allocate import allocate
from spt_dist.allocation.plan import Plan
from spt_dist.allocation.request import AllocationRequest
from spt_dist.config import check_arguments
from spt_dist.data.batches import deal_samples
from spt_dist.errors import UserError
from spt_dist.models.fingerprint import fingerprint
from spt_dist.models.segmentor import Segmentor, check_heads
from spt_dist.progress import progress_bar
from spt_dist.sensitivity.estimator import estimate_sensitivity
from spt_dist.sensitivity.shards import get_rank, world_size
from spt_dist.training.scoring import check_request
from spt_dist.tuning.delta import save_delta
from spt_dist.tuning.inject import install, is_tuned, make_modules

_KEY = "spt"
Batch = tuple[Tensor, Tensor]


@HOOKS.register_module()
class SPTHook(Hook):
    """Scores the backbone, makes a plan and puts it onto the model, before mmengine trains it.

    Happens once the model has its weights, on the runner's own training data. The optimizer and the schedulers are
    then built anew from the config. ``scores/`` and ``plan.safetensors`` are written to the work dir, and at the end of
    training ``task.safetensors``. Checkpoints of the runner hold the plan: resuming, and testing with the same config,
    take it from there.
    """

    def __init__(self, num_samples: int = 800, batch_size: int = 1, seed: int = 0, **options: Any) -> None:
        """What the config says.

        Args:
            num_samples: how many training images are scored, a seeded choice.
            batch_size: images in one pass of a rank; changes memory and speed, not the scores.
            seed: of that choice, of the random transforms of the scored images, and of the new modules.
            options: ``budget`` or ``tau``, and further arguments of ``allocate``.

        Raises:
            UserError: an unknown option, a value of the wrong type or out of range.
        """
        check_arguments(allocate, options, "SPTHook", own=["scores"])
        for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"SPTHook: {name}={value}: has to be at least 1")
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.request = AllocationRequest(**options)

    def before_run(self, runner: Runner) -> None:
        """Refuse what would fail after the scoring pass.

        Raises:
            UserError: a model or backbone that can't be scored or tuned; a budget out of range; or a hook that keeps a
                copy of the model.
        """
        if any(isinstance(hook, EMAHook) for hook in runner.hooks):
            raise UserError("SPTHook: EMAHook copies the model before it is injected; leave one of the two out")
        model = bare_model(runner)
        if not is_tuned(model):
            check_request(as_segmentor(model), self.request)

    def before_train(self, runner: Runner) -> None:
        """Stages 1 and 2, unless a checkpoint has brought its plan. Collective.

        Raises:
            UserError: the run was resumed from a checkpoint without a plan; there are fewer training images than are
                to be scored; as ``estimate_sensitivity`` and ``allocate``.
        """
        model = bare_model(runner)
        if not is_tuned(model):
            if runner.iter > 0:
                raise UserError(
                    "SPTHook: the checkpoint that was resumed holds no plan, so that it was not trained with SPTHook; "
                    "start from its weights (load_from=..., resume=False) or leave the hook out"
                )
            plan = self._make_plan(runner, model)
            self._put(runner, plan, fingerprint(model))
            runner.optim_wrapper.initialize_count_status(runner.model, runner.iter, runner.max_iters)
        runner.logger.info(model.spt_plan.summary())

    def after_train(self, runner: Runner) -> None:
        """Write the task file. Collective."""
        save_delta(bare_model(runner), Path(runner.work_dir) / "task.safetensors")

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Add the plan, and make the checkpoint one that torch loads with ``weights_only=True``, its default.

        mmengine's loader leaves that default as it is and so can't read its own checkpoints: they hold the logged
        curves as objects of its own.
        """
        model = bare_model(runner)
        tensors, metadata = model.spt_plan.to_tensors()
        checkpoint[_KEY] = {
            "tensors": tensors,
            "plan": metadata,
            "fingerprint": model.spt_fingerprint,
            "originals": model.spt_originals,
            "request": asdict(self.request),
        }
        checkpoint["message_hub"] = _to_plain(checkpoint["message_hub"])

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Put a checkpoint's plan onto the model, so that the weights find their places.

        Raises:
            UserError: the plan was made with other options than the config's, or for another model.
        """
        saved = checkpoint.pop(_KEY, None)
        if saved is None:
            return
        checkpoint["message_hub"] = _from_plain(checkpoint["message_hub"])
        wanted = asdict(self.request)
        for name, value in saved["request"].items():
            if value != wanted[name]:
                raise UserError(
                    f"SPTHook: {name}={wanted[name]!r}, but the checkpoint's plan was made with {value!r}; "
                    "make them agree, or train anew in another work dir"
                )
        model = bare_model(runner)
        if not is_tuned(model):
            # The runner may have loaded it to the GPU.
            tensors, originals = (_on_cpu(saved[part]) for part in ("tensors", "originals"))
            self._put(runner, Plan.from_tensors(tensors, saved["plan"], "checkpoint"), saved["fingerprint"])
            model.spt_originals = originals

    def _make_plan(self, runner: Runner, model: Any) -> Plan:
        """Stages 1 and 2 up to the plan, which is written with the scores. Collective."""
        dataset = runner.train_dataloader.dataset
        if self.num_samples > len(dataset):
            raise UserError(f"SPTHook: num_samples={self.num_samples}, but there are {len(dataset)} training images")
        generator = torch.Generator().manual_seed(self.seed)
        samples = torch.randperm(len(dataset), generator=generator)[: self.num_samples].sort().values.tolist()
        dealt = deal_samples(samples, self.batch_size, get_rank(), world_size(), same_batches=False)
        view = as_segmentor(model)
        with progress_bar("sensitivity", len(dealt), get_rank() == 0) as bar:

            def batches() -> Iterator[Batch]:
                for batch in dealt:
                    yield from stack([self.read(dataset, index, model.data_preprocessor) for index in batch.indices])
                    bar.advance()

            scores = estimate_sensitivity(view, batches(), view.per_image_losses, sample_ids=samples)
        plan = allocate(scores, **asdict(self.request))
        work_dir = Path(runner.work_dir)
        scores.save(work_dir / "scores")
        if get_rank() == 0:
            plan.save(work_dir / "plan.safetensors")
        return plan

    def read(self, dataset: Any, index: int, preprocessor: nn.Module) -> tuple[Tensor, Tensor]:
        """One training image as the model is trained on it, the same one on whichever rank and in whatever order.

        Returns:
            Image fp32 ``(C, H, W)``, normalised, and labels int64 ``(H, W)``, on the model's device.
        """
        with randomness_of(self.seed, index):
            sample = dataset[index]
            batch = {key: [value] for key, value in sample.items()}
            prepared = preprocessor(batch, training=True)
        return prepared["inputs"][0], prepared["data_samples"][0].gt_sem_seg.data[0].long()

    def _put(self, runner: Runner, plan: Plan, backbone_fingerprint: str) -> None:
        """Put the plan onto the model, and build anew what the runner built for all of its parameters."""
        model = bare_model(runner)
        with randomness_of(self.seed):
            modules = make_modules(model, plan)
        install(model, plan, modules, backbone_fingerprint)
        if is_model_wrapper(runner.model):
            # DistributedDataParallel knows the parameters that there were when it was made.
            runner.model = runner.wrap_model(runner.cfg.get("model_wrapper_cfg"), model)
        # In a test run there is none.
        if isinstance(runner.optim_wrapper, OptimWrapper):
            runner.optim_wrapper = runner.build_optim_wrapper(copy.deepcopy(runner.cfg.optim_wrapper))
            schedulers, runner.param_schedulers = runner.cfg.get("param_scheduler"), None
            # Refuses where there are schedulers already.
            runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
            if schedulers is not None:
                runner.param_schedulers = runner.build_param_scheduler(copy.deepcopy(schedulers))


def bare_model(runner: Runner) -> Any:
    """The runner's EncoderDecoder itself. (Not typed: torch has it that what a module holds is tensors and modules.)"""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def as_segmentor(model: nn.Module) -> Segmentor:
    """mmseg's model as one that can be scored: another class over the same modules.

    Raises:
        UserError: it is another model than a plain EncoderDecoder, or a head has a sampler.
    """
    if type(model) is not EncoderDecoder:
        raise UserError(f"SPTHook: model.type={type(model).__name__!r}: only 'EncoderDecoder' can be scored")
    view = copy.copy(model)
    view.__class__ = Segmentor
    assert isinstance(view, Segmentor)
    check_heads(view)
    return view


def stack(samples: list[tuple[Tensor, Tensor]]) -> Iterator[Batch]:
    """Batches of images and labels of equal size: none is padded, which would change its loss."""
    for _, group in groupby(samples, key=lambda sample: sample[0].shape):
        images, labels = zip(*group, strict=True)
        yield torch.stack(images), torch.stack(labels)


@contextmanager
def randomness_of(*key: int) -> Iterator[None]:
    """For the length of the block, random numbers follow from ``key`` alone; then they go on as if nothing had been."""
    states = random.getstate(), np.random.get_state()
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    has_gpu = torch.cuda.is_available()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if has_gpu else []):
        random.seed(seed)
        np.random.seed(seed)
        torch.random.default_generator.manual_seed(seed)
        if has_gpu:
            torch.cuda.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _to_plain(message_hub: Mapping[str, Any]) -> dict[str, Any]:
    """mmengine's message hub in tensors and plain numbers."""
    scalars: dict[str, HistoryBuffer] = message_hub["log_scalars"]
    curves = {
        name: {"values": _floats(buffer.data[0]), "counts": _floats(buffer.data[1]), "max_length": buffer.max_length}
        for name, buffer in scalars.items()
    }
    # numpy's numbers, as metrics are, are objects to torch's loader too.
    info = {
        name: value.item() if isinstance(value, np.generic) else value
        for name, value in message_hub["runtime_info"].items()
    }
    return {**message_hub, "log_scalars": curves, "runtime_info": info}


def _from_plain(message_hub: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``_to_plain``."""
    scalars = {
        name: HistoryBuffer(curve["values"].cpu().numpy(), curve["counts"].cpu().numpy(), curve["max_length"])
        for name, curve in message_hub["log_scalars"].items()
    }
    return {**message_hub, "log_scalars": scalars}


def _floats(values: Any) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float64))


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}
