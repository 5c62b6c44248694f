"""A tuned model beside its backbone: modules of its own, the frozen weights in common."""

from torch import Tensor, nn

from spt_dist.models.matrices import parent_of
from spt_dist.models.twins import make_twin
from spt_dist.tuning.delta import TaskFile, check_state, fit_head
from spt_dist.tuning.entries import EntryDelta
from spt_dist.tuning.inject import make_modules, place_modules, trained_tensors


class Variant(nn.Module):
    """What ``load_delta`` would make of a copy of the backbone, in the memory of what it tunes.

    Attributes:
        model: the tuned model. Parameters that the task leaves frozen are the backbone's own objects, so are buffers.
        changed: names of the modules that compute something else than the backbone's, the root and heads left out.
        own_parameters: parameters of the root module that have other values than the backbone's (``cls_token``).
    """

    def __init__(self, backbone: nn.Module, task: TaskFile) -> None:
        """``backbone`` is the plain model that ``task`` was made for; it stays as it is.

        Raises:
            UserError: the task does not fit the backbone.
        """
        super().__init__()
        plan = task.plan
        self.model = make_twin(backbone, but={*plan.parameters, *plan.head})
        fit_head(self.model, plan, task.state)
        modules = make_modules(self.model, plan)
        trained = trained_tensors(self.model, plan, modules)
        check_state(task.state, trained, task.path)
        for name, parameter in trained.items():
            parameter.data.copy_(task.state[name])
        place_modules(self.model, modules)
        entries = [name for name, module in modules.items() if isinstance(module, EntryDelta)]
        parameters = [*plan.parameters, *entries]
        self.changed = (modules.keys() - entries) | {parent_of(name) for name in parameters if parent_of(name)}
        self.own_parameters = {name for name in parameters if not parent_of(name)}

    def forward(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` images to the task's logits ``(B, K)``."""
        logits: Tensor = self.model(images)
        return logits

    def share_buffers(self, backbone: nn.Module) -> None:
        """Take the backbone's buffers again, after both have been moved: ``nn.Module`` makes new ones of them."""
        mine = dict(self.model.named_modules())
        for name, module in backbone.named_modules():
            if name in mine:
                mine[name]._buffers.update(module._buffers)
