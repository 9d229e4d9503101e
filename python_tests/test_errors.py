"""Every bad argument of the contract: refused by name, before anything is written."""

import math
import re

import pytest
import torch

import moco_ext

N, K, C = 4, 6, 3


def ptr(value=2, **kwargs):
    return torch.tensor([value], **{"dtype": torch.int64} | kwargs)


def good(op: str) -> dict:
    """Arguments the op accepts."""
    if op == "info_nce":
        return {
            "query": torch.randn(N, C),
            "key": torch.randn(N, C),
            "queue": torch.randn(K, C),
            "temperature": 0.07,
            "reduction": "mean",
        }
    if op == "enqueue_":
        return {"queue": torch.randn(K, C), "queue_ptr": ptr(), "keys": torch.randn(N, C)}
    if op == "momentum_update_":
        return {
            "key_params": [torch.randn(2, 3), torch.randn(5)],
            "query_params": [torch.randn(2, 3), torch.randn(5)],
            "m": 0.9,
        }
    return {"x": torch.randn(N, C), "eps": 1e-12}


# (op, what is wrong, the bad arguments, what the message must name)
BAD = [
    # --- info_nce
    ("info_nce", "query not a matrix", {"query": torch.randn(N)}, "query"),
    ("info_nce", "query with three dimensions", {"query": torch.randn(N, C, 1)}, "query"),
    ("info_nce", "key not a matrix", {"key": torch.randn(C)}, "key"),
    ("info_nce", "queue not a matrix", {"queue": torch.randn(K * C)}, "queue"),
    ("info_nce", "integer query", {"query": torch.ones(N, C, dtype=torch.int64)}, "query"),
    ("info_nce", "integer key", {"key": torch.ones(N, C, dtype=torch.int32)}, "key"),
    ("info_nce", "boolean queue", {"queue": torch.ones(K, C, dtype=torch.bool)}, "queue"),
    ("info_nce", "complex query", {"query": torch.ones(N, C, dtype=torch.complex64)}, "query: .*got complex64"),
    ("info_nce", "query of other width", {"query": torch.randn(N, C + 1)}, "query|queue"),
    ("info_nce", "key of other width", {"key": torch.randn(N, C + 1)}, "key"),
    ("info_nce", "key of other length", {"key": torch.randn(N + 1, C)}, "key"),
    ("info_nce", "key of one row", {"key": torch.randn(1, C)}, "key"),
    ("info_nce", "queue of other width", {"queue": torch.randn(K, C - 1)}, "query|queue"),
    ("info_nce", "queue the official way round", {"queue": torch.randn(C, K)}, "query|queue"),
    ("info_nce", "empty queue", {"queue": torch.randn(0, C)}, "queue"),
    (
        "info_nce",
        "no features",
        {"query": torch.randn(N, 0), "key": torch.randn(N, 0), "queue": torch.randn(K, 0)},
        "queue",
    ),
    ("info_nce", "transposed queue", {"queue": torch.randn(C, K).t()}, "queue"),
    ("info_nce", "queue of every other row", {"queue": torch.randn(2 * K, C)[::2]}, "queue"),
    ("info_nce", "queue with gradient", {"queue": torch.randn(K, C, requires_grad=True)}, "queue.*EndToEnd"),
    ("info_nce", "zero temperature", {"temperature": 0.0}, "temperature"),
    ("info_nce", "negative temperature", {"temperature": -0.07}, "temperature"),
    ("info_nce", "NaN temperature", {"temperature": math.nan}, "temperature"),
    ("info_nce", "infinite temperature", {"temperature": math.inf}, "temperature"),
    ("info_nce", "temperatures of other rows", {"temperature": torch.full((N + 1,), 0.07)}, "temperature"),
    ("info_nce", "integer tensor temperature", {"temperature": torch.tensor(1)}, "temperature"),
    ("info_nce", "zero tensor temperature", {"temperature": torch.tensor(0.0)}, "temperature"),
    ("info_nce", "NaN tensor temperature", {"temperature": torch.tensor(math.nan)}, "temperature"),
    ("info_nce", "temperature not a number", {"temperature": "hot"}, "temperature"),
    ("info_nce", "unknown reduction", {"reduction": "max"}, "reduction"),
    ("info_nce", "no reduction", {"reduction": None}, "reduction"),
    ("info_nce", "query on another device", {"query": torch.randn(N, C, device="meta")}, "query"),
    ("info_nce", "key on another device", {"key": torch.randn(N, C, device="meta")}, "key"),
    ("info_nce", "queue on another device", {"queue": torch.randn(K, C, device="meta")}, "query|queue"),
    # --- enqueue_
    ("enqueue_", "queue not a matrix", {"queue": torch.randn(K)}, "queue"),
    ("enqueue_", "integer queue", {"queue": torch.ones(K, C, dtype=torch.int64)}, "queue"),
    ("enqueue_", "empty queue", {"queue": torch.randn(0, C)}, "queue"),
    ("enqueue_", "transposed queue", {"queue": torch.randn(C, K).t()}, "queue"),
    ("enqueue_", "expanded queue", {"queue": torch.randn(1, C).expand(K, C)}, "queue"),
    ("enqueue_", "int32 pointer", {"queue_ptr": ptr(dtype=torch.int32)}, "queue_ptr"),
    ("enqueue_", "float pointer", {"queue_ptr": ptr(dtype=torch.float32)}, "queue_ptr"),
    ("enqueue_", "0-dim pointer", {"queue_ptr": torch.tensor(2)}, "queue_ptr"),
    ("enqueue_", "two pointers", {"queue_ptr": torch.tensor([2, 3])}, "queue_ptr"),
    ("enqueue_", "pointer not a tensor", {"queue_ptr": 2}, "queue_ptr"),
    ("enqueue_", "keys not a matrix", {"keys": torch.randn(C)}, "keys"),
    ("enqueue_", "integer keys", {"keys": torch.ones(N, C, dtype=torch.int64)}, "keys"),
    ("enqueue_", "float64 keys alone", {"keys": torch.randn(N, C).double()}, "keys"),
    ("enqueue_", "keys of other width", {"keys": torch.randn(N, C + 1)}, "keys"),
    ("enqueue_", "keys on another device", {"keys": torch.randn(N, C, device="meta")}, "keys"),
    ("enqueue_", "pointer on another device", {"queue_ptr": ptr(device="meta")}, "queue_ptr"),
    # --- momentum_update_
    ("momentum_update_", "fewer queries", {"query_params": [torch.randn(2, 3)]}, "query_params"),
    ("momentum_update_", "fewer keys", {"key_params": [torch.randn(2, 3)]}, "query_params|key_params"),
    ("momentum_update_", "no queries", {"query_params": []}, "query_params"),
    (
        "momentum_update_",
        "other numel",
        {"query_params": [torch.randn(2, 3), torch.randn(6)]},
        r"query_params\[1\]",
    ),
    (
        "momentum_update_",
        "other shape",
        {"query_params": [torch.randn(3, 2), torch.randn(5)]},
        r"query_params\[0\]",
    ),
    (
        "momentum_update_",
        "broadcast",
        {"query_params": [torch.randn(2, 3), torch.randn(1)]},
        r"query_params\[1\]",
    ),
    (
        "momentum_update_",
        "integer key",
        {"key_params": [torch.randn(2, 3), torch.ones(5, dtype=torch.int64)]},
        r"key_params\[1\]",
    ),
    (
        "momentum_update_",
        "integer query",
        {"query_params": [torch.ones(2, 3, dtype=torch.int32), torch.randn(5)]},
        r"query_params\[0\]",
    ),
    (
        "momentum_update_",
        "keys that share memory with themselves",
        {"key_params": [torch.randn(2, 3), torch.zeros(1).expand(5)]},
        r"key_params\[1\]",
    ),
    (
        "momentum_update_",
        "query on another device",
        {"query_params": [torch.randn(2, 3), torch.randn(5, device="meta")]},
        r"query_params\[1\]",
    ),
    ("momentum_update_", "not a list of tensors", {"query_params": [torch.randn(2, 3), 1.0]}, "query_params"),
    ("momentum_update_", "m below 0", {"m": -0.01}, r"\bm\b"),
    ("momentum_update_", "m above 1", {"m": 1.5}, r"\bm\b"),
    ("momentum_update_", "NaN m", {"m": math.nan}, r"\bm\b"),
    ("momentum_update_", "NaN tensor m", {"m": torch.tensor(math.nan)}, r"\bm\b"),
    ("momentum_update_", "tensor m above 1", {"m": torch.tensor(2.0)}, r"\bm\b"),
    ("momentum_update_", "m [1]", {"m": torch.tensor([0.9])}, r"\bm\b"),
    ("momentum_update_", "integer tensor m", {"m": torch.tensor(1)}, r"\bm\b"),
    ("momentum_update_", "m not a number", {"m": "slow"}, r"\bm\b"),
    # --- l2_normalize
    ("l2_normalize", "not a matrix", {"x": torch.randn(C)}, r"\bx\b"),
    ("l2_normalize", "integer", {"x": torch.ones(N, C, dtype=torch.int64)}, r"\bx\b"),
    ("l2_normalize", "negative eps", {"eps": -1.0}, "eps"),
    ("l2_normalize", "NaN eps", {"eps": math.nan}, "eps"),
]


def tensors_of(arguments):
    for value in arguments.values():
        yield from [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, torch.Tensor)]


@pytest.mark.parametrize(("op", "wrong", "bad", "names"), BAD, ids=[f"{row[0]}: {row[1]}" for row in BAD])
def test_bad_arguments_are_refused_by_name(op, wrong, bad, names):
    arguments = good(op) | bad
    before = [None if t.is_meta else (t, t.detach().clone(), t._version) for t in tensors_of(arguments)]
    with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
        getattr(moco_ext, op)(**arguments)
    assert re.search(names, str(error.value), re.DOTALL), str(error.value)
    for t, value, version in filter(None, before):
        assert torch.allclose(t, value, rtol=0, atol=0, equal_nan=True)
        assert t._version == version


@pytest.mark.parametrize("op", ["info_nce", "enqueue_", "momentum_update_", "l2_normalize"])
def test_the_table_starts_from_good_arguments(op):
    """Otherwise every row of it could be refused for a reason of its own."""
    getattr(moco_ext, op)(**good(op))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("op", "name"),
    [
        *[("info_nce", name) for name in ("query", "key", "queue")],
        *[("enqueue_", name) for name in ("queue", "queue_ptr", "keys")],
        *[("momentum_update_", name) for name in ("key_params", "query_params")],
    ],
)
def test_cpu_and_cuda_do_not_mix(op, name):
    """One argument at a time stays on the CPU; the message names it or the one it disagrees with."""

    def cuda(value):
        if isinstance(value, list):
            return [v.cuda() for v in value]
        return value.cuda() if isinstance(value, torch.Tensor) else value

    arguments = {key: value if key == name else cuda(value) for key, value in good(op).items()}
    before = [t.clone() for t in tensors_of(arguments)]
    with pytest.raises((ValueError, TypeError, RuntimeError), match=r"device|cuda"):
        getattr(moco_ext, op)(**arguments)
    assert all(map(torch.equal, tensors_of(arguments), before))
