"""Optimizers by name, torch's and timm's, and their parameter groups."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..encoders import layer_numbers
from ..mechanism import Mechanism

# The others need a closure, sparse gradients or matrices only.
_TORCH: dict[str, type[Optimizer]] = {
    kind.__name__.lower(): kind
    for kind in (
        torch.optim.SGD,
        torch.optim.AdamW,
        torch.optim.Adam,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.Adamax,
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        torch.optim.Adadelta,
    )
}
_SECOND_ORDER = ("adahessian",)
_MOMENTUM = 0.9


def check_name(name: str) -> None:
    """Raise an error unless :func:`build_optimizer` knows the name.

    Raises:
        ValueError: unknown; similar names are suggested.
        ModuleNotFoundError: the name may be one of timm's, which is not installed.
    """
    if name in _TORCH:
        return
    try:
        import timm.optim
    except ModuleNotFoundError as error:
        if error.name not in ("timm", "timm.optim"):
            raise
        message = f"optimizer: {name} is not one of torch's ({', '.join(_TORCH)}); timm's need pip install timm"
        raise ModuleNotFoundError(message, name="timm") from None
    known = [*_TORCH, *map(str, timm.optim.list_optimizers(exclude_filters=list(_SECOND_ORDER)))]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"optimizer: expected one of {', '.join(_TORCH)} or of timm's, got {name!r}{hint}")


def build_optimizer(
    model: Mechanism,
    name: str = "sgd",
    *,
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = _MOMENTUM,
    betas: tuple[float, ...] = (),
    eps: float | None = None,
    layer_decay: float | None = None,
    decay_norm_bias: bool | None = None,
) -> Optimizer:
    """The optimizer of a model.

    With ``decay_norm_bias`` and without ``layer_decay`` there is one group of all parameters, also of those without
    gradient, as in the official optimizer states. Otherwise groups hold the trained parameters only, each with an
    ``lr_scale``, the factor of its learning rate.

    Args:
        name: ``"sgd"``, ``"adamw"`` or another of torch's, else one of ``timm.optim.list_optimizers()``, such as
            ``"lars"`` and ``"lamb"``.
        momentum: of optimizers that have one.
        betas, eps: by default the optimizer's own.
        layer_decay: the learning rate of a layer is multiplied by this once for each layer above it in the query
            encoder (:func:`moco_ext.encoders.layer_numbers`).
        decay_norm_bias: weight decay for vectors (norms, biases) too, and for what a timm encoder's
            ``no_weight_decay()`` names. None: yes, unless the optimizer scales each layer's rate by its norms (LARS,
            LAMB); it then leaves these parameters unscaled, as published.

    Raises:
        ValueError: an unknown name, or a hyperparameter that the optimizer does not have.
        ModuleNotFoundError: the name may be one of timm's, which is not installed.
    """
    check_name(name)
    chosen: dict[str, Any] = {"momentum": momentum, "betas": betas or None, "eps": eps}
    defaults = _made(name, [nn.Parameter(torch.zeros(2, 2))], lr, weight_decay, {}).defaults
    for key, value in list(chosen.items()):
        if key in defaults and value is not None:
            if key == "betas" and len(value) != len(defaults["betas"]):
                raise ValueError(f"betas: expected {len(defaults['betas'])} numbers with {name}, got {value}")
            continue
        if value not in (None, _MOMENTUM):
            setting = "opt_eps" if key == "eps" else key
            raise ValueError(f"{setting}: expected none with optimizer {name}, got {value}")
        del chosen[key]
    adapts = "always_adapt" in defaults
    if decay_norm_bias is None:
        decay_norm_bias = not adapts
    if layer_decay is None and decay_norm_bias:
        return _made(name, model.parameters(), lr, weight_decay, chosen)
    groups = _groups(model, weight_decay, layer_decay, decay_norm_bias)
    if adapts:  # timm's default is not to, at a weight decay of 0
        for exempt, group in groups:
            group["always_adapt"] = not exempt
    return _made(name, [group for _, group in groups], lr, weight_decay, chosen)


def state_size(name: str) -> float:
    """Bytes of the optimizer's state per byte of a weight matrix: 1 for SGD with momentum, 2 for AdamW."""
    weight = nn.Parameter(torch.zeros(256, 256))
    weight.grad = torch.ones_like(weight)
    optimizer = _made(name, [weight], 0.1, 0.0, {})
    optimizer.step()
    return sum(value.nbytes for value in optimizer.state[weight].values() if isinstance(value, Tensor)) / weight.nbytes


def _made(name: str, parameters: Any, lr: float, weight_decay: float, chosen: dict[str, Any]) -> Optimizer:
    options = {"lr": lr, "weight_decay": weight_decay, "momentum": _MOMENTUM, **chosen}
    if name in _TORCH:
        kind = _TORCH[name]
        if "momentum" not in kind.__init__.__code__.co_varnames:
            del options["momentum"]
        return kind(parameters, **options)
    from timm.optim import create_optimizer_v2

    try:
        return create_optimizer_v2(parameters, opt=name, **options)
    except (AssertionError, ImportError, RuntimeError, TypeError) as error:  # apex, bitsandbytes not installed
        raise ValueError(f"optimizer: expected one that works here, got {name}: {error}") from None


def _groups(
    model: Mechanism, weight_decay: float, layer_decay: float | None, decay_norm_bias: bool
) -> list[tuple[bool, dict[str, Any]]]:
    """Trained parameters by weight decay and layer, in the model's order: (exempt from weight decay, group)."""
    encoder = model.encoder_q
    undecayed: Collection[str] = getattr(encoder, "no_weight_decay", tuple)()
    numbers = {} if layer_decay is None else layer_numbers(encoder)
    last = max(numbers.values(), default=0)
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        own = name.removeprefix("encoder_q.")
        exempt = not decay_norm_bias and (parameter.ndim <= 1 or own in undecayed)
        scale = 1.0 if layer_decay is None else layer_decay ** (last - numbers.get(own, last))
        new = {"params": [], "weight_decay": 0.0 if exempt else weight_decay, "lr_scale": scale}
        groups.setdefault((scale, exempt), new)["params"].append(parameter)
    return [(exempt, group) for (_, exempt), group in groups.items()]


def warn_of_late_drops(schedule: Collection[int], end: int, unit: str) -> None:
    """Warn of milestones that a run of ``end`` epochs or iterations does not reach."""
    if late := [str(milestone) for milestone in schedule if milestone >= end]:
        warnings.warn(
            f"schedule: the learning rate would drop after {', '.join(late)} {unit}, but the run has only {end}; see "
            "--schedule",
            stacklevel=3,
        )
