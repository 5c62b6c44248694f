"""Many tasks over one frozen backbone in memory."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from spt_dist.errors import UserError
from spt_dist.models.fingerprint import fingerprint
from spt_dist.models.matrices import head_buffers
from spt_dist.tuning.delta import read_delta
from spt_dist.tuning.inject import is_tuned
from spt_dist.tuning.multitask.mixed import Part, run_mixed
from spt_dist.tuning.multitask.slicing import Slicing, find_slicing
from spt_dist.tuning.multitask.variant import Variant


class TaskBank(nn.Module):
    """Task files over one backbone, each in the memory of what it tunes, for inference.

    Batches may hold samples of different tasks. ``.to``, ``.eval`` and the like act on the backbone and on all tasks.

    Attributes:
        backbone: the plain model; its modules and parameters stay as they are.
        current: the task of batches that don't name theirs, ``None`` at first.
    """

    def __init__(self, backbone: nn.Module) -> None:
        """``backbone``: the plain model that the task files were made for, with any head; on any device.

        Raises:
            UserError: it is tuned already, or its head has running means.
        """
        super().__init__()
        if head_buffers(backbone):
            raise UserError("TaskBank: is for classifiers; the head of this model keeps running means (batch norm)")
        if is_tuned(backbone):
            raise UserError("TaskBank: this model has been injected already; build the backbone anew")
        self.backbone = backbone
        self.current: str | None = None
        # Now, since a cast of the weights would change it.
        self._fingerprint = fingerprint(backbone)
        self._names: list[str] = []
        self._variants = nn.ModuleList()
        self._slicings: dict[tuple[torch.Size, bool], Slicing] = {}

    @property
    def names(self) -> list[str]:
        """Names of the tasks, in the order in which they were added."""
        return list(self._names)

    def add(self, name: str, path: str | Path) -> None:
        """Read a task file and keep the task under ``name``.

        Raises:
            UserError: the name is taken; the file is missing or damaged, or made for another backbone. The bank is
                unchanged then.
        """
        if name in self._names:
            raise UserError(f"TaskBank.add: there is a task {name!r} already; remove it first or take another name")
        task = read_delta(path)
        if task.fingerprint != self._fingerprint:
            task.check_backbone(self.backbone)
        self._variants.append(Variant(self.backbone, task))
        self._names.append(name)

    def remove(self, name: str) -> None:
        """Forget a task and free its memory.

        Raises:
            UserError: there is no such task.
        """
        self._find(name)
        del self._variants[self._names.index(name)]
        self._names.remove(name)
        if self.current == name:
            self.current = None

    def switch(self, name: str) -> None:
        """Make ``name`` the task of batches that don't name theirs. Touches no weights.

        Raises:
            UserError: there is no such task.
        """
        self._find(name)
        self.current = name

    @torch.no_grad()
    def forward(self, images: Tensor, tasks: Sequence[str] | None = None) -> Tensor | list[Tensor]:
        """Logits, without gradients.

        Args:
            images: ``(B, C, H, W)``.
            tasks: the name of each sample's task, in any order.

        Returns:
            Without ``tasks`` the current task's logits ``(B, K)``, those of ``load_delta``'s model under ``no_grad``,
            bit for bit if the backbone is frozen. Else a list of B tensors ``(K_i,)``, one a sample, up to rounding.

        Raises:
            UserError: an unknown task, another number of tasks than of samples, or no current task.
        """
        if tasks is None:
            if self.current is None:
                raise UserError("TaskBank: no task is current; call switch(name) first or pass tasks=, one a sample")
            logits: Tensor = self._find(self.current)(images)
            return logits
        if len(tasks) != len(images):
            raise UserError(f"TaskBank: {len(tasks)} tasks for {len(images)} images; name one task for each image")
        samples: dict[str, list[int]] = {name: [] for name in tasks}
        for sample, name in enumerate(tasks):
            samples[name].append(sample)
        parts, start = [], 0
        for name, own in samples.items():
            parts.append(Part(self._find(name), slice(start, start + len(own))))
            start += len(own)
        order = [sample for own in samples.values() for sample in own]
        rows = [row for logits in self._run(parts, images[order]) for row in logits]
        return [row for _, row in sorted(zip(order, rows, strict=True), key=lambda pair: pair[0])]

    def _run(self, parts: list[Part], images: Tensor) -> list[Tensor]:
        """The logits of each part of a sorted batch."""
        if len(parts) == 1:
            return [parts[0].variant(images)]
        key = (images.shape[1:], self.training)
        if key not in self._slicings:
            self._slicings[key] = find_slicing(self.backbone, images)
        return run_mixed(self.backbone, parts, images, self._slicings[key])

    def _find(self, name: str) -> Variant:
        if name not in self._names:
            known = ", ".join(self._names) or "none yet, call add first"
            raise UserError(f"TaskBank: no task {name!r}; it has {known}")
        variant = self._variants[self._names.index(name)]
        assert isinstance(variant, Variant)
        return variant

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TaskBank":
        super()._apply(fn, recurse)
        for variant in self._variants:
            assert isinstance(variant, Variant)
            variant.share_buffers(self.backbone)
        return self
