"""momentum_update_: wrapper and fake kernel."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import check_devices, check_plain, is_sharded, scalar


@torch.no_grad()
def momentum_update_(
    key_params: Iterable[Tensor],
    query_params: Iterable[Tensor],
    m: float | Tensor,
    *,
    low_precision: Iterable[Tensor] = (),
) -> None:
    """Move the key parameters towards the query parameters, in place: ``k = m·k + (1 - m)·q`` (Eq. 2 of the paper).

    Updates all tensors in one launch. Computes in float32 (float64 for float64) and rounds to the key's dtype. Keys in
    bfloat16 lose most steps to rounding at m = 0.999, so keep them in float32; the queries may be bfloat16.

    With DTensors, such as parameters sharded by FSDP2 (``fully_shard``), each rank updates its own shards; nothing is
    gathered.

    Args:
        key_params: tensors to update, such as ``model.parameters()``; views remain views. No two may share memory.
        query_params: tensors of the same shapes on the same device, sharded alike; their dtypes may differ. A query may
            be its own key, or appear several times, but may not share memory with another key.
        m: momentum in [0, 1], as a number or a 0-dim tensor (on the parameters' device, without a synchronization).
        low_precision: optional bfloat16 or float16 copies of the key parameters, one for each, with the same shapes and
            strides. They are written in the same pass: the encoder runs with the copies, while the float32 keys keep
            steps that are too small for 16 bits.

    Raises:
        ValueError: lists, shapes, dtypes, devices or shardings that do not match, m outside [0, 1], shared memory, or a
            freed storage. Nothing is written.
        TypeError: tensor subclasses other than DTensor.
    """
    keys, queries = _local_shards(list(key_params), list(query_params))
    copies = list(low_precision)
    m_tensor, value = scalar("m", m)
    if m_tensor is None and not 0 <= value <= 1:
        raise ValueError(f"m: expected a momentum in [0, 1], got {m}")
    if len(keys) == len(queries) == len(copies) == 0:
        return  # without a tensor there is no device to dispatch to
    torch.ops.moco_ext.momentum_update_(keys, queries, m_tensor, value, copies)
    torch.autograd.graph.increment_version((*keys, *copies))


@torch.library.register_fake("moco_ext::momentum_update_")
def _(key_params, query_params, m_tensor, m, low_precision):
    for i, (key, query) in enumerate(zip(key_params, query_params, strict=True)):
        check_devices(**{"key_params[0]": key_params[0], f"key_params[{i}]": key, f"query_params[{i}]": query})


def _local_shards(keys: Sequence[Tensor], queries: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """This rank's part of each DTensor; other tensors as they are."""
    for i, (key, query) in enumerate(zip(keys, queries, strict=False)):  # the operator reports unequal lengths
        if _sharding(key) != _sharding(query):
            raise ValueError(
                f"query_params[{i}]: expected the sharding of key_params[{i}], {_sharding(key) or 'none'}, got "
                f"{_sharding(query) or 'none'}; shard both encoders alike"
            )
    local_keys, local_queries = (
        [tensor.to_local() if is_sharded(tensor) else tensor for tensor in tensors]  # type: ignore[attr-defined]
        for tensors in (keys, queries)
    )
    check_plain(key_params=local_keys, query_params=local_queries)
    return local_keys, local_queries


def _sharding(tensor: Any) -> tuple[Any, Any] | None:
    return (tensor.placements, tensor.device_mesh) if is_sharded(tensor) else None
