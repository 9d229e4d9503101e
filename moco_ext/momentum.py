"""The momentum encoder's update, over parameters laid out in one buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .ops import momentum_update_

# Each parameter starts on a multiple of this many elements: 64 bytes for float32, what vector loads and cuDNN like.
ALIGNMENT = 16


@torch.no_grad()
def flatten_parameters_(module: nn.Module) -> Tensor:
    """Move all parameters of a module into one contiguous buffer; each becomes a view of it, in place.

    Values, gradients, ``requires_grad``, strides (``channels_last`` weights) and parameter objects stay: an optimizer
    or DDP built before or after goes on working. Shared parameters are stored once. The gaps that align each
    parameter are zero. Already flat, nothing moves and the same memory is returned.

    Args:
        module: its parameters must share one dtype and one device.

    Returns:
        The buffer, 1-d, of the parameters' dtype. Moving the module (``.to()``, ``.cuda()``) or copying it ends the
        views; call this again then. :class:`moco_ext.MoCo` does.

    Raises:
        ValueError: no parameters, or parameters of several dtypes or devices; the message names them.
    """
    parameters = list(_parameters(module))
    if not parameters:
        raise ValueError(f"module: expected parameters to flatten, {type(module).__name__} has none")
    first = parameters[0]
    for name, parameter in module.named_parameters():
        if parameter.dtype != first.dtype or parameter.device != first.device:
            raise ValueError(
                f"module: expected parameters of one dtype and device, got {first.dtype} on {first.device} and "
                f"{name} {parameter.dtype} on {parameter.device}"
            )
    flat = _flat_buffer(parameters)
    if flat is not None:
        return flat
    offsets, total = _layout(parameters)
    flat = first.new_zeros(total)
    for parameter, offset in zip(parameters, offsets, strict=True):
        strides = parameter.stride() if _is_dense(parameter) else torch.empty(parameter.shape, device="meta").stride()
        view = flat.as_strided(parameter.shape, strides, offset)
        view.copy_(parameter)
        parameter.data = view
    return flat


@torch.no_grad()
def update_key_encoder_(
    key_encoder: nn.Module, query_encoder: nn.Module, m: float | Tensor, shadow: HalfWeights | None = None
) -> None:
    """``k = m·k + (1 - m)·q`` over all parameters of two encoders of the same structure (Eq. 2 of the paper).

    One launch over two flat buffers; where a module has been moved, copied or given new layers since, its buffer is
    rebuilt first. Parameters of several dtypes cannot share a buffer and are updated as a list, still in one launch.
    Buffers (BatchNorm statistics) are left alone: the key encoder's move by its own forward passes, as published.
    ``shadow``, the key encoder's, is written in the same pass.

    Raises:
        ValueError: the encoders' parameters differ in number or shape; the message names the first that does.
    """
    keys, queries = list(_parameters(key_encoder)), list(_parameters(query_encoder))
    if not keys and not queries:
        return  # an nn.Identity, say, in place of a head
    flat_key, flat_query = _flat_buffer(keys), _flat_buffer(queries)
    same_layout = [p.stride() for p in keys] == [p.stride() for p in queries]
    if flat_key is None or flat_query is None or not same_layout or flat_key.numel() != flat_query.numel():
        _check_same_structure(key_encoder, query_encoder)
        if shadow is None and len({(p.dtype, p.device) for p in keys + queries}) > 1:
            momentum_update_(keys, queries, m)
            return
        flat_query = flatten_parameters_(query_encoder)
        for key, query in zip(keys, queries, strict=True):
            if key.stride() != query.stride():  # one encoder was moved to channels_last without the other
                key.data = torch.empty_strided(query.shape, query.stride(), dtype=key.dtype, device=key.device).copy_(
                    key
                )
        flat_key = flatten_parameters_(key_encoder)
    if shadow is None:
        momentum_update_([flat_key], [flat_query], m)
    else:
        shadow.follow(flat_key, keys, lambda half: momentum_update_([flat_key], [flat_query], m, low_precision=[half]))


class HalfWeights:
    """A 16-bit copy of a float32 module's weights, for running it as autocast would, without casts at each step.

    What autocast casts is copied, the weights of two and more dimensions; norms and biases stay float32. Whatever
    changes the module's parameters otherwise (a loaded checkpoint, a move to another device) is noticed by their
    versions, and the copy made anew.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._flat: Tensor | None = None
        self._copied: list[tuple[int, int]] = []

    def __call__(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """``module(inputs)`` under autocast with the copied weights."""
        parameters = list(_parameters(module))
        if self._flat is None or self._copied != _versions(parameters):
            flat = flatten_parameters_(module)
            if flat.dtype != torch.float32:
                raise ValueError(f"key_dtype: expected an encoder of float32 parameters, got {flat.dtype}")
            self.follow(flat, parameters, lambda half: half.copy_(flat))
        assert self._flat is not None
        offsets = dict(zip(parameters, _layout(parameters)[0], strict=True))
        weights = {
            name: self._flat.as_strided(parameter.shape, parameter.stride(), offsets[parameter])
            for name, parameter in module.named_parameters(remove_duplicate=False)
            if parameter.ndim > 1 and name.endswith("weight")
        }
        with torch.autocast(inputs.device.type, dtype=self.dtype):
            return functional_call(module, weights, (inputs,), tie_weights=False)

    def follow(self, flat: Tensor, parameters: list[nn.Parameter], write: Callable[[Tensor], object]) -> None:
        """Let ``write`` fill the copy [P] of ``flat`` [P], the parameters' buffer, and take note of their state."""
        if self._flat is None or self._flat.shape != flat.shape or self._flat.device != flat.device:
            self._flat = torch.empty_like(flat, dtype=self.dtype)
        write(self._flat)
        self._copied = _versions(parameters)


def _versions(parameters: list[nn.Parameter]) -> list[tuple[int, int]]:
    return [(parameter.data_ptr(), parameter._version) for parameter in parameters]


def _parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """``module.parameters()`` without building names: this runs every step."""
    seen = set()
    for child in module.modules():
        for parameter in child._parameters.values():
            if parameter is not None and parameter not in seen:
                seen.add(parameter)
                yield parameter


def _layout(parameters: list[nn.Parameter]) -> tuple[list[int], int]:
    """Where each parameter starts in the buffer, and the buffer's length, in elements."""
    offsets, total = [], 0
    for parameter in parameters:
        offsets.append(total)
        total += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
    return offsets, total


def _flat_buffer(parameters: list[nn.Parameter]) -> Tensor | None:
    """The buffer these parameters are views of, in order and whole, or None.

    Asked of the parameters themselves each time, so there is no record that a move or a copy could leave stale.
    """
    if not parameters:
        return None
    first = parameters[0].detach()
    offsets, total = _layout(parameters)
    start, size = first.data_ptr(), first.element_size()
    if first.storage_offset() != 0 or first.untyped_storage().nbytes() < total * size:
        return None
    for parameter, offset in zip(parameters, offsets, strict=True):
        in_place = parameter.data_ptr() == start + offset * size or parameter.numel() == 0
        if not in_place or parameter.dtype != first.dtype:
            return None
    return first.as_strided((total,), (1,), 0)


def _is_dense(parameter: Tensor) -> bool:
    span = 1 + sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    return parameter.numel() == 0 or span == parameter.numel()


def _check_same_structure(key_encoder: nn.Module, query_encoder: nn.Module) -> None:
    keys, queries = dict(key_encoder.named_parameters()), dict(query_encoder.named_parameters())
    for name in [*queries, *keys]:
        if name not in keys or name not in queries:
            side = "query" if name in queries else "key"
            raise ValueError(
                f"encoders: expected the same parameters on both sides, only the {side} encoder has {name}"
            )
        if keys[name].shape != queries[name].shape:
            raise ValueError(
                f"encoders: expected {name} of the same shape on both sides, got {list(queries[name].shape)} in the "
                f"query encoder and {list(keys[name].shape)} in the key encoder"
            )
