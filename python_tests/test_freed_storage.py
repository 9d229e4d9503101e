"""Tensors with a storage too small for their shape, like parameters that FSDP has freed, are errors."""

import pytest
import torch

import moco_ext

N, K, C = 4, 6, 3


def arguments(op: str) -> dict:
    """Arguments that the operator accepts, every optional tensor among them."""
    if op == "info_nce":
        return {
            "query": torch.randn(N, C, requires_grad=True),
            "key": torch.randn(N, C, requires_grad=True),
            "queue": torch.randn(K, C),
            "temperature": torch.tensor(0.07, requires_grad=True),
            "num_valid": torch.tensor([K]),
            "in_batch": True,
            "query_ids": torch.arange(N),
            "queue_ids": torch.arange(K),
        }
    if op == "enqueue_":
        return {"queue": torch.randn(K, C), "queue_ptr": torch.tensor([2]), "keys": torch.randn(N, C)}
    if op == "momentum_update_":
        return {
            "key_params": [torch.randn(2), torch.randn(2, 3)],
            "query_params": [torch.randn(2), torch.randn(2, 3)],
            "m": torch.tensor(0.9),
            "low_precision": [torch.zeros(2).bfloat16(), torch.zeros(2, 3).bfloat16()],
        }
    return {"x": torch.randn(N, C)}


CASES = [
    (op, name)
    for op in ("info_nce", "enqueue_", "momentum_update_", "l2_normalize")
    for name, value in arguments(op).items()
    if not isinstance(value, bool)
]


@pytest.mark.parametrize("left", [0, 0.5], ids=["freed", "halved"])
@pytest.mark.parametrize(("op", "name"), CASES)
def test_a_storage_too_small_is_refused(device, op, name, left):
    inputs = {
        k: [x.to(device) for x in v] if isinstance(v, list) else v.to(device) if isinstance(v, torch.Tensor) else v
        for k, v in arguments(op).items()
    }
    getattr(moco_ext, op)(**inputs)
    broken = inputs[name][1] if isinstance(inputs[name], list) else inputs[name]
    storage = broken.untyped_storage()
    storage.resize_(int(left * storage.nbytes()))
    label = rf"{name}\[1\]" if isinstance(inputs[name], list) else name
    with pytest.raises(ValueError, match=f"{label}: expected a storage of at least"):
        getattr(moco_ext, op)(**inputs)


def test_a_view_beyond_the_end_of_its_storage_is_refused(device):
    """Enough bytes for the shape alone, but not at this offset and with these strides."""
    rows = torch.randn(2 * N, C, device=device)[N::2]
    rows.untyped_storage().resize_(N * C * 4)
    with pytest.raises(ValueError, match=r"x: expected a storage of at least 84 bytes for shape \[2, 3\], got 48"):
        moco_ext.l2_normalize(rows)


def test_an_empty_tensor_needs_no_storage(device):
    empty = torch.randn(0, C, device=device)
    empty.untyped_storage().resize_(0)
    assert moco_ext.l2_normalize(empty).shape == (0, C)
