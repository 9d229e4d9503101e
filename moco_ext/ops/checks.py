"""What the wrappers of all operators share: argument checks, and the call of a native operator."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..library import load_libraries

load_libraries()  # here, because every operator's module imports this one before it registers anything


def scalar(name: str, value: float | Tensor) -> tuple[Tensor | None, float]:
    """A scalar as the operators take it: a tensor stays on its device, anything else is a number."""
    if isinstance(value, Tensor):
        return value, math.nan
    if isinstance(value, (str, bytes)):
        raise TypeError(f"{name}: expected a number or a 0-dim tensor, got {value!r}")
    try:
        return None, float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number or a 0-dim tensor, got {value!r}") from None


def check_positive(name: str, value: float | Tensor) -> None:
    """Refuse what is no temperature, nor the inverse of one. Of a tensor on a device the value is not known."""
    tensor, number = scalar(name, value)
    if tensor is not None and tensor.numel() != 1:
        raise ValueError(f"{name}: expected a number or a tensor of one element, got shape {list(tensor.shape)}")
    if tensor is not None:
        number = tensor.item() if tensor.device.type == "cpu" and not torch.compiler.is_compiling() else 1.0
    least, most = (torch.finfo(torch.float32).tiny, 1 / torch.finfo(torch.float32).tiny)
    if not least <= number <= most:
        raise ValueError(f"{name}: expected a positive number from {least:g} to {most:g}, got {number:g}")


def check_tensors(**values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def refuse_forward_mode(name: str, *tensors: Tensor | None) -> None:
    """The operators would drop tangents without a word."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is not None and tensor.is_floating_point() and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(f"{name}: forward-mode differentiation is not implemented; use reverse mode")


def native(operator: Any, *arguments: Any) -> Any:
    """Call an operator; its out-of-memory errors become torch's own type."""
    try:
        return operator(*arguments)
    except RuntimeError as error:
        if str(error).startswith("CUDA out of memory") and not isinstance(error, torch.OutOfMemoryError):
            raise torch.OutOfMemoryError(str(error)) from None
        raise


def check_devices(**tensors: Tensor) -> None:
    """For the fake kernels, which a meta tensor among real ones reaches; the native ones check for themselves."""
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != first.device:
            raise ValueError(f"{name}: expected on the device of {first_name} ({first.device}), got {tensor.device}")


def check_plain(**tensors: Sequence[Tensor]) -> None:
    """Refuse DTensors and other wrappers, whose memory the kernels cannot reach."""
    for name, of_name in tensors.items():
        for tensor in of_name:
            if _is_wrapper(tensor):
                raise TypeError(
                    f"{name}: expected plain tensors, got {type(tensor).__name__}; parameters sharded by FSDP2 "
                    "(fully_shard) share no buffer: use its MixedPrecisionPolicy instead of low_precision"
                )


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, such as a parameter that FSDP2 (``fully_shard``) has sharded."""
    if not _is_wrapper(tensor):
        return False
    from torch.distributed.tensor import DTensor  # not in every build of torch

    return isinstance(tensor, DTensor)


def _is_wrapper(tensor: Tensor) -> bool:
    return hasattr(type(tensor), "__tensor_flatten__")
