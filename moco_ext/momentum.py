"""The momentum update, over parameters that share one buffer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, MutableMapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.dlpack import from_dlpack, to_dlpack
from torch.utils.weak import WeakTensorKeyDictionary

from .ops import momentum_update_
from .ops.checks import check_plain, is_sharded

# Each parameter starts on a multiple of this many elements: 64 bytes for float32, what vector loads and cuDNN like.
ALIGNMENT = 16

# The buffer of each flattened parameter. An entry that a move or a copy has made stale does no harm: it is compared
# with the parameters' addresses at each use.
_buffers: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()


# torch.compile cannot trace addresses: it breaks the graph around these functions.
_untraced = torch.compiler.disable(reason="looks at the addresses of parameters")


@_untraced
@torch.no_grad()
def flatten_parameters_(module: nn.Module) -> Tensor:
    """Move all parameters of a module into one contiguous buffer, in place.

    Values, gradients, ``requires_grad``, strides (``channels_last`` weights) and the parameter objects are kept, so
    optimizers and DDP wrappers remain valid. Shared parameters are stored once. Parameters are aligned, and the gaps
    between them are zero. If the parameters are already flat, nothing is moved and the existing buffer is returned.

    Each parameter keeps a storage of its size, which begins inside the buffer: ``torch.save``, safetensors and
    accelerate save it like any other. Moving the module (``.to()``, ``.cuda()``), copying it or sharing its memory
    between processes gives its parameters new memory; call this function again afterwards, as :class:`moco_ext.MoCo`
    does.

    Args:
        module: its parameters must share one dtype and one device.

    Returns:
        The buffer, 1-d, of the parameters' dtype.

    Raises:
        ValueError: no parameters, parameters of several dtypes or devices, or two with the same memory, which would
            have their own afterwards; the message names them.
        TypeError: the parameters are tensor subclasses, such as the DTensors of FSDP2.
    """
    parameters = list(_parameters(module))
    if not parameters:
        raise ValueError(f"module: expected parameters to flatten, {type(module).__name__} has none")
    check_plain(module=parameters)
    first = parameters[0]
    if first.is_meta:
        raise ValueError("module: expected parameters in memory, got the meta device; see torch.nn.Module.to_empty")
    for name, parameter in module.named_parameters():
        if parameter.dtype != first.dtype or parameter.device != first.device:
            raise ValueError(
                f"module: expected parameters of one dtype and device, got {first.dtype} on {first.device} and "
                f"{name} {parameter.dtype} on {parameter.device}"
            )
    flat = _flat_buffer(parameters)
    if flat is not None:
        return flat
    owner: dict[int, str] = {}
    for name, parameter in module.named_parameters():
        other = owner.setdefault(parameter.data_ptr(), name) if parameter.numel() > 0 else name
        if other != name:
            raise ValueError(
                f"module: expected parameters with memory of their own, got {name} in that of {other}; to share "
                "weights, register one nn.Parameter under both names"
            )
    offsets, total = _layout(parameters)
    flat = first.new_zeros(total)
    for parameter, offset in zip(parameters, offsets, strict=True):
        strides = parameter.stride() if _is_dense(parameter) else torch.empty(parameter.shape, device="meta").stride()
        # A plain view would share the buffer's storage, which the tools that save parameters take for one big tensor.
        # DLPack makes a storage of the parameter's size, which keeps the buffer alive.
        part = from_dlpack(to_dlpack(flat[offset : offset + parameter.numel()]))
        parameter.data = part.as_strided(parameter.shape, strides).copy_(parameter)
        _buffers[parameter] = flat
    return flat


@_untraced
@torch.no_grad()
def update_key_encoder_(
    key_encoder: nn.Module,
    query_encoder: nn.Module,
    m: float | Tensor,
    low_precision: LowPrecisionWeights | None = None,
    *,
    flatten: bool = True,
) -> None:
    """``k = m·k + (1 - m)·q`` over all parameters of two encoders of the same structure (Eq. 2 of the paper).

    Both encoders are flattened (:func:`flatten_parameters_`) at the first call, and again after they have been moved or
    copied, so that the update is one launch over two buffers. Parameters of several dtypes are updated as a list, still
    in one launch, and so are the local shards of encoders that FSDP2 (``fully_shard``) has sharded, and parameters that
    are a part of something else's memory, such as an optimizer's buckets. Buffers (BatchNorm statistics) are not
    updated: the key encoder's own forward passes update its statistics, as published.

    Args:
        key_encoder, query_encoder: modules with the same parameters.
        m: momentum in [0, 1], or a 0-dim tensor.
        low_precision: the key encoder's low-precision weights, written in the same pass.
        flatten: if False, leave the parameters where they are and update them as a list.

    Raises:
        ValueError: the encoders' parameters differ in number, shape, order or sharding; the message names the first
            that does.
        TypeError: sharded parameters with ``low_precision``, or other tensor subclasses.
    """
    keys, queries = list(_parameters(key_encoder)), list(_parameters(query_encoder))
    if not keys and not queries:
        return  # for example, an nn.Identity as the head
    _warn_if_steps_are_lost(keys, m)
    flat_key, flat_query = _flat_buffer(keys), _flat_buffer(queries)
    same_layout = [(p.shape, p.stride()) for p in keys] == [(p.shape, p.stride()) for p in queries]
    if flat_key is None or flat_query is None or not same_layout or flat_key.numel() != flat_query.numel():
        # FSDP2 leaves the parameters of a root module gathered after a forward pass without gradient. An update of
        # these copies would be lost.
        keys, queries = (list(_parameters(resharded(encoder))) for encoder in (key_encoder, query_encoder))
        check_same_structure(key_encoder, query_encoder)
        flatten = flatten and not any(p.is_meta or has_another_owner(p) for p in keys + queries)
        if low_precision is None and (not flatten or len({(p.dtype, p.device) for p in keys + queries}) > 1):
            momentum_update_(keys, queries, m)
            return
        check_plain(key_encoder=keys, query_encoder=queries)
        flat_query = flatten_parameters_(query_encoder) if flatten else None
        for key, query in zip(keys, queries, strict=True):
            if key.stride() != query.stride():  # only one of the encoders was converted to channels_last
                key.data = torch.empty_strided(query.shape, query.stride(), dtype=key.dtype, device=key.device).copy_(
                    key
                )
        flat_key = flatten_parameters_(key_encoder)
    if flat_query is None:
        assert low_precision is not None
        low_precision.refresh(
            flat_key, keys, lambda copy: momentum_update_(keys, queries, m, low_precision=_parts(copy, keys))
        )
    elif low_precision is None:
        momentum_update_([flat_key], [flat_query], m)
    else:
        low_precision.refresh(
            flat_key, keys, lambda copy: momentum_update_([flat_key], [flat_query], m, low_precision=[copy])
        )


def _warn_if_steps_are_lost(keys: list[nn.Parameter], m: float | Tensor) -> None:
    dtype = keys[0].dtype if keys else torch.float32
    if dtype not in (torch.bfloat16, torch.float16) or isinstance(m, Tensor):
        return
    # Half a unit in the last place is eps / 4 or more of a weight: here, even the step of one that differs by a tenth.
    if 0 < (1 - m) / 10 < torch.finfo(dtype).eps / 4:
        warnings.warn(
            f"key_encoder: expected parameters that momentum {m} can move, got {dtype}, which rounds most of its steps "
            "to nothing; keep them in float32, and train under torch.autocast",
            stacklevel=3,
        )


def resharded(module: nn.Module) -> nn.Module:
    """The module, without the parameters that FSDP2 has gathered in it: they are again the shards of this rank."""
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FSDPModule

        for child in module.modules():
            if isinstance(child, FSDPModule):
                child.reshard()
    return module


class LowPrecisionWeights:
    """A 16-bit copy of a float32 module's weights, to run the module as under autocast without casting at each step.

    Copies what autocast would cast, the weights of two or more dimensions; norms and biases stay float32. The copy is
    refreshed when the module's parameters have changed in any other way (a loaded checkpoint, another device), which
    their version counters tell.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"low_precision: expected None, torch.bfloat16 or torch.float16, got {dtype}")
        self.dtype = dtype
        self._flat: Tensor | None = None
        self._copied: list[tuple[int, int]] = []

    def __call__(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """``module(inputs)`` under autocast with the copied weights."""
        weights = self._weights(module)
        with torch.autocast(inputs.device.type, dtype=self.dtype):
            return functional_call(module, weights, (inputs,), tie_weights=False)

    @_untraced
    def _weights(self, module: nn.Module) -> dict[str, Tensor]:
        """The copied weights by name, refreshed if need be."""
        parameters = list(_parameters(module))
        if self._flat is None or self._copied != _versions(parameters):
            flat = flatten_parameters_(module)
            if flat.dtype != torch.float32:
                raise ValueError(f"low_precision: expected an encoder of float32 parameters, got {flat.dtype}")
            self.refresh(flat, parameters, lambda copy: copy.copy_(flat))
        assert self._flat is not None
        parts = dict(zip(parameters, _parts(self._flat, parameters), strict=True))
        return {
            name: parts[parameter]
            for name, parameter in module.named_parameters(remove_duplicate=False)
            if parameter.ndim > 1 and name.endswith("weight")
        }

    def refresh(self, flat: Tensor, parameters: list[nn.Parameter], write: Callable[[Tensor], object]) -> None:
        """Let ``write`` fill the copy [P] of ``flat`` [P], the buffer of ``parameters``."""
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


def _parts(flat: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """The part of a buffer that belongs to each parameter."""
    offsets = zip(parameters, _layout(parameters)[0], strict=True)
    return [flat.as_strided(parameter.shape, parameter.stride(), offset) for parameter, offset in offsets]


def has_another_owner(parameter: Tensor) -> bool:
    """Whether a parameter's memory is a part of something else, which would go on without it: FSDP2's shards, or the
    buckets of ZeroRedundancyOptimizer(parameters_as_bucket_view=True)."""
    return is_sharded(parameter) or parameter.untyped_storage().nbytes() > parameter.numel() * parameter.element_size()


def _flat_buffer(parameters: list[nn.Parameter]) -> Tensor | None:
    """The part of a buffer that these parameters fill, in order, or None if they are not flat."""
    flat = _buffers.get(parameters[0]) if parameters else None
    if flat is None:
        return None
    offsets, total = _layout(parameters)
    start, size = parameters[0].data_ptr(), flat.element_size()
    begin = (start - flat.data_ptr()) // size
    if not 0 <= begin <= flat.numel() - total:
        return None
    for parameter, offset in zip(parameters, offsets, strict=True):
        in_place = parameter.data_ptr() == start + offset * size or parameter.numel() == 0
        if not in_place or parameter.dtype != flat.dtype:
            return None
    return flat[begin : begin + total]


def _is_dense(parameter: Tensor) -> bool:
    span = 1 + sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    return parameter.numel() == 0 or span == parameter.numel()


# Under these names torch.compile and DDP keep the module that they wrap; often only the trained encoder is wrapped.
_WRAPPED = ("_orig_mod", "module")


def check_same_structure(key_encoder: nn.Module, query_encoder: nn.Module) -> None:
    """Refuse encoders whose parameters differ in name, shape or order."""
    keys, queries = (
        {
            ".".join(part for part in name.split(".") if part not in _WRAPPED): p
            for name, p in encoder.named_parameters()
        }
        for encoder in (key_encoder, query_encoder)
    )
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
    for key, query in zip(keys, queries, strict=True):
        if key != query:
            raise ValueError(
                f"encoders: expected parameters in the same order on both sides, got {query} in the query encoder in "
                f"place of the key encoder's {key}"
            )
