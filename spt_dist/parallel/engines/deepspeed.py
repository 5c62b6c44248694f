"""DeepSpeed's ZeRO 0 to 2: whole parameters on every rank, gradients and optimizer state shared out."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from spt_dist.compat import forbid_deepspeed_cpu_kernels
from spt_dist.parallel.engines.base import MOMENTS, Engine, OptimizerSettings, build_adamw
from spt_dist.tuning.inject import trainable_parameters


class DeepSpeedEngine(Engine):
    """A DeepSpeed engine around our own model and AdamW."""

    def __init__(
        self,
        model: nn.Module,
        settings: OptimizerSettings,
        device: torch.device,
        zero_stage: int = 2,
        amp: bool = False,
    ) -> None:
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        if device.type == "cpu":
            forbid_deepspeed_cpu_kernels()
        deepspeed.init_distributed()
        self.zero_stage = zero_stage
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=model, optimizer=build_adamw(model, settings), config=_deepspeed_config(settings, zero_stage, amp)
        )
        self.module = self.engine.module

    def __call__(self, inputs: Tensor) -> Tensor:
        """Forward pass through DeepSpeed's engine, which autocasts if told so."""
        outputs: Tensor = self.engine(inputs)
        return outputs

    def backward(self, loss: Tensor) -> None:
        """Backward pass; DeepSpeed reduces the gradients to their owners."""
        self.engine.backward(loss)

    def step(self) -> float:
        """Let DeepSpeed clip, step and broadcast the updated parameters."""
        norm: Any = None
        if not self.zero_stage:
            # Without ZeRO, DeepSpeed computes no norm unless it clips.
            gradients = [parameter.grad for _, parameter in trainable_parameters(self.module)]
            norm = torch.nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
        self.engine.step()
        return float(self.engine.get_global_grad_norm() if norm is None else norm)

    def gather_state(self) -> dict[str, Tensor]:
        """The fp32 masters and their moments, gathered from the ranks that own them."""
        state = {}
        has_moments = self.engine.global_steps > 0
        self._link_moments()
        for name, parameter in trainable_parameters(self.module):
            values = {"param": self._whole(parameter, None)}
            if has_moments:
                values |= {moment: self._whole(parameter, moment) for moment in MOMENTS}
            for kind, value in values.items():
                state[f"{kind}/{name}"] = value.detach().float().cpu().reshape(parameter.shape).clone()
        return state

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor], num_steps: int) -> None:
        """Write masters, moments and the parameters that the next forward pass will use."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        base = self.engine.basic_optimizer
        if self.zero_stage and num_steps:
            # Moments exist only after a step, and the setters below need them to.
            for partition in self.optimizer.single_partition_of_fp32_groups:
                base.state[partition] = {moment: torch.zeros_like(partition) for moment in MOMENTS}
            self._link_moments()
        for name, parameter in trainable_parameters(self.module):
            parameter.copy_(state[f"param/{name}"])
            moments = {moment: state[f"{moment}/{name}"].to(parameter) for moment in MOMENTS} if num_steps else {}
            if not self.zero_stage:
                base.state[parameter] = moments
                continue
            safe_set_full_fp32_param(parameter, state[f"param/{name}"].to(parameter.device))
            for moment, value in moments.items():
                safe_set_full_optimizer_state(parameter, value, moment)
        for moments in base.state.values():
            moments["step"] = torch.tensor(float(num_steps))
        self.engine.global_steps = num_steps

    def _whole(self, parameter: nn.Parameter, moment: str | None) -> Tensor:
        """The fp32 parameter, or one of its moments, gathered from its owners."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if not self.zero_stage:
            value: Tensor = parameter if moment is None else self.engine.basic_optimizer.state[parameter][moment]
            return value
        value = (
            safe_get_full_fp32_param(parameter) if moment is None else safe_get_full_optimizer_state(parameter, moment)
        )
        return value

    def _link_moments(self) -> None:
        """Let DeepSpeed's accessors find the moments of every parameter group.

        0.19.8 links them after the step of the first group only and then considers it done.
        """
        if self.zero_stage:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()


def _deepspeed_config(settings: OptimizerSettings, zero_stage: int, amp: bool) -> dict[str, Any]:
    return {
        # The loss is normalised by the global number of samples before DeepSpeed sees it, so this is only formal.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Left out, 0.19.8 would clip at 1.0.
        "gradient_clipping": settings.clip_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": zero_stage},
        "torch_autocast": {"enabled": amp, "dtype": "bfloat16"},
        "steps_per_print": 1 << 60,
    }
