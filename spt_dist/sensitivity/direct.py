"""Per-sample gradients of parameters that a model uses directly: tokens, position embeddings, layer scales, tables.

While the model runs, every torch function that touches such a parameter, or a tensor computed from such parameters
alone, is seen here. The parameter is the same for all samples until it meets them, in a sum, a product, a concatenation
or an attention mask: there it is expanded to one copy a sample. The gradient of the copies is taken back, sample by
sample, through what led from the parameter to that place. What is used in any other way is reported, not guessed.

Shape suffix: L leading rows, a multiple of the number of samples.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from spt_dist.errors import UserError
from spt_dist.models.sharded import is_sharded
from spt_dist.sensitivity.nested import map_tensors, tensors

# Names of torch functions, in-place and reflected forms included, that work element by element and broadcast.
_ELEMENTWISE = {"add", "sub", "mul", "div", "true_divide", "truediv", "addcmul"}
_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
_ATTENTION_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")

OnScore = Callable[[str, Tensor], None]


class DirectUses(TorchFunctionMode):
    """Follows directly used parameters through a forward pass.

    ``on_score(name, scores)`` is called in the backward pass, as soon as all uses of a parameter have been passed, with
    the sum over samples of its squared gradients, fp32 in the parameter's shape.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[str],
        places: Mapping[str, tuple[str, str]],
        last: Collection[str],
        on_score: OnScore,
    ) -> None:
        """Follow nothing yet.

        Args:
            model: the model.
            layers: layers with a rule, the weights of which nothing else may use.
            places: name of each directly used parameter -> its module and its own name there.
            last: those whose scores are to come after everything else's.
            on_score: see the class.
        """
        super().__init__()
        self._last = last
        self.unsupported: dict[str, str] = {}
        self._places = places
        self._owners = {module: model.get_submodule(module) for module, _ in places.values()}
        self._sharded = {module for module, owner in self._owners.items() if is_sharded(owner)}
        self._on_score = on_score
        self._num_samples = 0
        self._forward_runs = False
        self._recomputed: str | None = None
        self._settled = False
        self._rows_of_one_sample: dict[tuple[tuple[str, ...], int], int] = {}
        self._watched: dict[int, tuple[str, Tensor]] = {}
        # An engine works on the weights that it spreads over ranks, so these can't be watched.
        self._layer_weights = {
            id(parameter): (f"{name}.{own_name}".lstrip("."), parameter)
            for name in layers
            if not is_sharded(model)
            for own_name, parameter in model.get_submodule(name).named_parameters(recurse=False)
        }
        self._forget()

    def _forget(self) -> None:
        self._leaves: dict[str, Tensor] = {}
        self._computed: dict[int, tuple[tuple[str, ...], Tensor]] = {}
        self._uses: Counter[str] = Counter()
        self._weight_uses: Counter[str] = Counter()
        self._places_seen: Counter[tuple[str, ...]] = Counter()
        self._gradients: dict[str, Tensor] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks on the modules that own the parameters for the length of the block."""
        handles = []
        for module, owner in self._owners.items():
            if module not in self._sharded:
                self._watch(module)
            handles.append(owner.register_forward_pre_hook(lambda *_, module=module: self._enter(module)))
            handles.append(owner.register_forward_hook(lambda *_, module=module: self._leave(module), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def forward_pass(self, num_samples: int) -> Iterator[None]:
        """Follow the parameters through a forward pass over ``num_samples`` samples (1 to take a batch as one).

        The first one settles what is in ``unsupported``, ``name -> reason``.
        """
        self._num_samples = num_samples
        self._forget()
        self._forward_runs = True
        with self:
            yield
        self._forward_runs = False
        if not self._settled:
            self._settled = True
            for name in self._places:
                if not self._uses[name]:
                    self.unsupported.setdefault(name, "not used in a way that can be followed to the samples")

    def check_layer_weights(self) -> None:
        """A layer's own call uses its weight once; a function elsewhere that uses it too would go unseen.

        Raises:
            UserError: names a weight that more than one function has used.
        """
        for name, uses in self._weight_uses.items():
            if uses > 1:
                raise UserError(
                    f"{name}: used functionally as well as by its layer's call; a weight that is used in several "
                    "places can't be scored"
                )

    def end_backward(self) -> set[str]:
        """The backward pass is over: uses that no gradient has reached have none.

        Returns:
            Parameters that a gradient has reached on another way than through the uses that are followed.
        """
        for name in list(self._gradients):
            self._finish(name)
        missed = {name for name, leaf in self._leaves.items() if leaf.grad is not None} - self.unsupported.keys()
        self._forget()
        return missed

    def pass_layer(self, layer: str, inputs: Tensor) -> None:
        """A layer with a rule is called: no parameter can be followed through it."""
        if self._forward_runs and self._is_tracked(inputs):
            self._give_up([inputs], f"passes through {layer} before it meets the samples")

    def _enter(self, module: str) -> None:
        # Engines that spread parameters over ranks put the whole ones in place only while a module runs, and work on
        # them at other times.
        self._watch(module)
        if not self._forward_runs and self._recomputed is None:
            # A checkpoint computes the module anew in the backward pass, where nothing is followed otherwise.
            self._recomputed = module
            self.__enter__()

    def _leave(self, module: str) -> None:
        if self._recomputed == module:
            self._recomputed = None
            self.__exit__(None, None, None)
        if module in self._sharded:
            self._watched = {key: item for key, item in self._watched.items() if self._places[item[0]][0] != module}

    def _watch(self, module: str) -> None:
        for name, (owner, own_name) in self._places.items():
            if owner == module:
                parameter = self._owners[owner].get_parameter(own_name)
                self._watched[id(parameter)] = (name, parameter)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._count_layer_weights(args, kwargs)
        found = [item for item in tensors((args, kwargs)) if self._is_tracked(item)]
        if not found:
            return func(*args, **kwargs)
        if not torch.is_grad_enabled():
            result = func(*args, **kwargs)
            # What an engine does to parameters that it spreads over ranks is no use of them.
            own = [item for item in found if not self._sharded.intersection(self._owners_of(item))]
            if own and self._forward_runs and any(True for _ in tensors(result)):
                self._give_up(own, "used with gradients switched off, as in a reentrant checkpoint")
            return result
        others = [item for item in tensors((args, kwargs)) if not self._is_tracked(item)]
        if any(other.requires_grad for other in others):
            return self._meet_samples(func, args, kwargs, found)
        names = tuple(dict.fromkeys(name for item in found for name in self._names_of(item)))
        result = func(*map_tensors(args, self._traced), **map_tensors(kwargs, self._traced))
        for tensor in tensors((result, args[:1] if _works_in_place(func) else ())):
            if tensor.requires_grad:
                self._computed[id(tensor)] = (names, tensor)
        return result

    def _count_layer_weights(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._forward_runs or not self._layer_weights:
            return
        given = [id(item) for item in tensors((args, kwargs))]
        if len(given) > 1:
            self._weight_uses.update({self._layer_weights[key][0] for key in given if key in self._layer_weights})

    def _is_tracked(self, tensor: Tensor) -> bool:
        if id(tensor) in self._computed:
            return True
        return id(tensor) in self._watched and self._watched[id(tensor)][0] not in self.unsupported

    def _names_of(self, tensor: Tensor) -> tuple[str, ...]:
        if id(tensor) in self._computed:
            return self._computed[id(tensor)][0]
        return (self._watched[id(tensor)][0],)

    def _owners_of(self, tensor: Tensor) -> set[str]:
        return {self._places[name][0] for name in self._names_of(tensor)}

    def _traced(self, tensor: Tensor) -> Tensor:
        """A tracked tensor with a graph that leads back to copies of the parameters; others stay."""
        if not self._is_tracked(tensor) or id(tensor) in self._computed:
            return tensor
        name = self._watched[id(tensor)][0]
        if name not in self._leaves:
            # A copy, because an engine may take the whole parameter away after the module's forward.
            self._leaves[name] = tensor.detach().clone().requires_grad_()
        return self._leaves[name]

    def _meet_samples(self, func: Callable[..., Any], args: Any, kwargs: Any, found: list[Tensor]) -> Any:
        """Run a function of tracked tensors and of samples, with a copy of the tracked ones for each sample."""
        kind = func.__name__.strip("_").removeprefix("r").removeprefix("i")
        if _works_in_place(func) and self._is_tracked(args[0]):
            self._give_up(found, f"samples are written into it by {func.__name__}")
        elif kind in _ELEMENTWISE:
            operands = list(tensors((args, kwargs)))
            ndim = max(item.ndim for item in operands)
            rows = max((item.shape[0] for item in operands if item.ndim == ndim > 0), default=1)
            spread = partial(self._spread, rows, ndim)
            return func(*map_tensors(args, spread), **map_tensors(kwargs, spread))
        elif func in _CONCATENATIONS and (self._num_samples == 1 or _axis(args, kwargs) != 0):
            # Nothing is broadcast here: what is joined has as many rows as the samples already.
            return func(*map_tensors(args, self._spread_rows), **map_tensors(kwargs, self._spread_rows))
        elif func is F.scaled_dot_product_attention:
            given = dict(zip(_ATTENTION_ARGUMENTS, args, strict=False)) | kwargs
            if [id(item) for item in found] == [id(given.get("attn_mask"))]:
                query = given["query"]
                return func(**map_tensors(given, partial(self._spread, len(query), query.ndim)))
        elif func is F.linear:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            if [id(item) for item in found] == [id(given.get("bias"))]:
                inputs = given["input"]
                bias = self._spread(len(inputs), inputs.ndim, given["bias"])
                return F.linear(inputs, given["weight"]) + bias
        self._give_up(found, f"no rule for its use in {func.__name__}")
        return func(*args, **kwargs)

    def _give_up(self, found: list[Tensor], reason: str) -> None:
        """List the parameters behind some tensors as unsupported.

        Raises:
            UserError: it is too late for that, since their scores are being summed up.
        """
        for name in dict.fromkeys(name for item in found for name in self._names_of(item)):
            if self._settled and name not in self.unsupported:
                raise UserError(
                    f"{name}: {reason}, and not so in the first forward pass, over one sample; with micro_batch=1 the "
                    "passes are alike"
                )
            self.unsupported.setdefault(name, reason)

    def _spread_rows(self, tensor: Tensor) -> Tensor:
        return self._spread(len(tensor), tensor.ndim, tensor)

    def _spread(self, rows: int, ndim: int, tensor: Tensor) -> Tensor:
        """A tracked tensor as ``(L, ...)``, whose gradient is caught; others stay."""
        if not self._is_tracked(tensor):
            return tensor
        names, traced = self._names_of(tensor), self._traced(tensor)
        if self._forward_runs:
            self._uses.update(names)
        self._check_rows(names, rows)
        leaves = {name: self._leaves[name] for name in names if name in self._leaves}
        show = partial(self._add_gradients, leaves, traced)
        spread: Tensor = _Spread.apply(traced, rows, ndim, show)
        return spread

    def _check_rows(self, names: tuple[str, ...], rows: int) -> None:
        place = (names, self._places_seen[names])
        self._places_seen[names] += 1
        if self._num_samples == 1:
            self._rows_of_one_sample.setdefault(place, rows)
        elif rows != self._num_samples * self._rows_of_one_sample.get(place, rows):
            raise UserError(
                f"{', '.join(names)}: meets {rows} rows for {self._num_samples} samples and "
                f"{self._rows_of_one_sample[place]} for one; samples must lie along the outermost axis. "
                "With micro_batch=1 (in a config: sensitivity.batch_size=1) any layout will do"
            )

    def _add_gradients(self, leaves: dict[str, Tensor], traced: Tensor, grads_L: Tensor) -> None:
        """Take the gradient of the copies back to the parameters, one sample at a time."""
        samples = grads_L.reshape(self._num_samples, -1, *grads_L.shape[1:])
        # What has rows of its own already (`cls_token.expand(B, -1, -1)`) gets each sample's in their place.
        has_rows = traced.ndim == grads_L.ndim and len(traced) == len(grads_L)
        for sample, grads in enumerate(samples):
            if has_rows:
                whole = grads.new_zeros(samples.shape)
                whole[sample] = grads
            else:
                whole = grads.sum(dim=0)
            found = torch.autograd.grad(
                traced, list(leaves.values()), whole.reshape(traced.shape), retain_graph=True, allow_unused=True
            )
            for (name, leaf), gradient in zip(leaves.items(), found, strict=True):
                if name not in self._gradients:
                    self._gradients[name] = leaf.new_zeros(self._num_samples, *leaf.shape, dtype=torch.float32)
                if gradient is not None:
                    self._gradients[name][sample] += gradient
        for name in leaves:
            self._uses[name] -= 1
            if not self._uses[name] and name not in self._last:
                self._finish(name)

    def _finish(self, name: str) -> None:
        gradients = self._gradients.pop(name)
        if name not in self.unsupported:
            self._on_score(name, gradients.square().sum(dim=0))


class _Spread(torch.autograd.Function):
    """Expands a tensor along a leading axis and shows the gradient of the copies."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, rows: int, ndim: int, show: Callable[[Tensor], None]) -> Tensor:
        ctx.show = show
        shape = (1,) * (ndim - tensor.ndim) + tuple(tensor.shape)
        return tensor.detach().view(shape).expand(rows, *shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grads_L: Tensor) -> tuple[None, None, None, None]:
        ctx.show(grads_L)
        return None, None, None, None


def _works_in_place(func: Callable[..., Any]) -> bool:
    name = func.__name__
    return name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def _axis(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The axis of a concatenation, counted from the front."""
    axis: int = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    return axis % next(tensors((args, kwargs))).ndim
