"""Compares random calls of the CPU operators with their definitions in float64 NumPy.

    python tools/fuzz.py --seconds 20                                        # a third for each instruction set
    python tools/fuzz.py --seconds 900 --seed 1 --out bench/results/fuzz.json
    MOCO_EXT_ISA=avx2 python tools/fuzz.py --seed 1 --first 123 --count 1    # one call, as a failure prints it

A call is determined by the seed and its number: operator, shapes, dtypes, memory layouts, threads, options, and values
(huge and tiny norms and temperatures, rows of zeros, NaN). Inputs, and the memory around the outputs, must be
unchanged. Bounds are those of python_tests/cases.py: a float32 logit of size L has an error of about 2^-24 L, which
becomes the relative error of each softmax weight.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import moco_ext
from moco_ext.library import build_info
from moco_ext.ops import color_steps
from moco_ext.runs.environment import environment
from moco_ext.runs.files import read_json, write_json

HALF = (torch.bfloat16, torch.float16)
INSTRUCTION_SETS = ("avx512", "avx2", "baseline")
FEATURES = (1, 2, 3, 7, 16, 17, 31, 64, 96, 127, 128, 129, 520)
ROWS = (0, 1, 1, 2, 15, 16, 17, 33, 63, 64, 65, 130)


class Mismatch(AssertionError):
    pass


def expect(good: Any, what: str) -> None:
    if not np.all(good):
        raise Mismatch(what)


class Draw:
    """The random choices of one call."""

    def __init__(self, *seed: int):
        self.rng = np.random.default_rng(seed)
        self.call = ""
        self.guards: list[tuple[Tensor, Tensor]] = []  # whole buffers and their contents before the call

    def of(self, *values: Any) -> Any:
        return values[self.rng.integers(len(values))]

    def integer(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def chance(self, p: float = 0.5) -> bool:
        return bool(self.rng.random() < p)

    def power(self, low: float, high: float) -> float:
        return float(10 ** self.rng.uniform(low, high))

    def tensor(self, values: np.ndarray, dtype: torch.dtype, contiguous: bool = False) -> Tensor:
        """The values, rounded, in memory of any layout, surrounded by other elements."""
        x = torch.from_numpy(np.asarray(values, dtype=np.float64)).to(dtype)
        layout = "shifted" if contiguous else self.of("shifted", "transposed", "sliced", "expanded")
        if x.dim() != 2 or layout == "shifted":
            buffer = torch.full((x.numel() + 9,), 77, dtype=dtype)
            start = self.integer(0, 8)
            view = buffer[start : start + x.numel()].view(x.shape)
        elif layout == "transposed":
            buffer = torch.full((x.shape[1], x.shape[0] + 1), 77, dtype=dtype)
            view = buffer.t()[: x.shape[0]]
        elif layout == "sliced":
            buffer = torch.full((2 * x.shape[0], x.shape[1] + 3), 77, dtype=dtype)
            view = buffer[::2, 1 : x.shape[1] + 1]
        else:  # all rows are the first one
            buffer = x[:1].clone()
            view = buffer.expand_as(x) if len(x) else buffer
        if layout != "expanded" or x.dim() != 2:
            view.copy_(x)
        self.guards.append((buffer, buffer.clone()))
        return view

    def integers(self, low: int, high: int, size: int) -> Tensor:
        ids = torch.from_numpy(self.rng.integers(low, high, size))
        return torch.repeat_interleave(ids, 2)[::2] if self.chance() else ids

    def unchanged(self) -> None:
        for buffer, before in self.guards:
            expect(torch.equal(bits(buffer), bits(before)), "an input, or memory beside it, has changed")


def bits(x: Tensor) -> Tensor:
    return torch.cat([x.flatten()]).view(torch.uint8)


def wide(x: Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def close(got: Tensor, want: np.ndarray, bound: Any, what: str) -> None:
    """Within bound and the rounding to got's dtype. Where the result overflows the dtype, infinity is right."""
    info = torch.finfo(got.dtype)
    expect(tuple(got.shape) == want.shape, f"{what}: shape {tuple(got.shape)} instead of {want.shape}")
    floor = 2.0**-24 if got.dtype == torch.float16 else 8 * info.smallest_normal  # flushed, several times over
    value = wide(got)
    with np.errstate(invalid="ignore", over="ignore"):
        rounding = info.eps / 2 * np.abs(want) + floor
        bound = np.where(bound == math.inf, math.inf, bound + rounding)
        good = (np.abs(value - want) <= bound) | (np.isnan(value) & np.isnan(want)) | (value == want)
        good |= (bound == math.inf) | np.isinf(value) & (np.abs(want) + bound >= info.max)
    if not good.all():
        at = tuple(int(i) for i in np.argwhere(~good)[0])
        raise Mismatch(f"{what}{list(at)} = {value[at]:.9g}, expected {want[at]:.9g} +- {bound[at]:.2g}")


def unit_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with np.errstate(invalid="ignore"):
        norm = np.maximum(lengths(x)[:, None], 1e-12)
        return x / norm, norm


def lengths(x: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        return np.sqrt((x * x).sum(1))


def through_norm(unit: np.ndarray, norm: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    along = np.where(norm > 1e-12, (gradient * unit).sum(1, keepdims=True), 0.0)
    return (gradient - along * unit) / norm


def log_sum_exp(x: np.ndarray, where: np.ndarray) -> np.ndarray:
    """[N]; -inf of nothing."""
    x = np.where(where, x, -np.inf)
    top = x.max(1, initial=-np.inf, keepdims=True)
    shifted = np.exp(x - np.where(np.isinf(top), 0.0, top))
    with np.errstate(divide="ignore"):
        return (np.log(np.where(where, shifted, 0.0).sum(1, keepdims=True)) + np.where(np.isinf(top), 0.0, top))[:, 0]


def feature_rows(draw: Draw, n: int, c: int, dtype: torch.dtype, normalize: bool, near: Any = None) -> np.ndarray:
    """Rows of one norm, huge and tiny ones too; some are zero or NaN."""
    rows = draw.rng.standard_normal((n, c)) / math.sqrt(c)
    if near is not None and len(near) == n:
        rows += draw.of(0.0, 1.0, -1.0, 30.0) * near
    if dtype == torch.float16:
        low, high = (-2, 3) if normalize else (-1, 0)
    elif dtype == torch.float64:
        low, high = (-100, 100) if normalize else (-1, 2)
    else:
        low, high = (-30, 30) if normalize else (-1, 2)
    scale = draw.power(-1, min(high, 1)) if draw.chance(0.6) else draw.power(low, high)
    rows *= scale
    if n and draw.chance(0.3):
        rows[draw.integer(0, n - 1)] = 0
    if n and draw.chance(0.15):
        rows[draw.integer(0, n - 1), draw.integer(0, c - 1)] = draw.of(math.nan, math.inf) if normalize else math.nan
    return rows


def contrast(draw: Draw) -> dict[str, Any]:
    """Tensors and options of one problem of info_nce and expected_key."""
    big = draw.chance(0.03)  # enough work for several threads
    n, c = (draw.integer(60, 260), draw.of(64, 128, 129)) if big else (draw.of(*ROWS), draw.of(*FEATURES))
    K = draw.integer(2000, 9000) if big else draw.of(1, 1, 2, 63, 64, 65, 257, draw.integer(1, 1500))
    query_type, queue_type = (draw.of(torch.float32, torch.float32, *HALF) for _ in range(2))
    key_type = draw.of(query_type, query_type, torch.float32, torch.float16)
    if draw.chance(0.15):
        query_type = key_type = queue_type = torch.float64
    normalize, in_batch = draw.chance(0.7), draw.chance(0.4)
    m = n + draw.of(0, 0, 1, draw.integer(0, 70)) if in_batch else n
    offset = draw.integer(0, m - n)
    query = feature_rows(draw, n, c, query_type, normalize)
    key = feature_rows(draw, m, c, key_type, normalize, np.nan_to_num(unit_rows(np.nan_to_num(query))[0]))
    queue = unit_rows(draw.rng.standard_normal((K, c)))[0] * (1.0 if normalize else draw.power(-1, 1))
    if n and draw.chance(0.3):  # the first query is in the queue
        queue[draw.integer(0, K - 1)] = np.nan_to_num(unit_rows(np.nan_to_num(query[:1]))[0][0])
    if draw.chance(0.05):
        queue[draw.integer(0, K - 1), draw.integer(0, c - 1)] = math.nan
    a: dict[str, Any] = {
        "query": draw.tensor(query, query_type),
        "key": draw.tensor(key, key_type),
        "queue": draw.tensor(queue, queue_type, contiguous=True),
        "normalize": normalize,
        "in_batch": in_batch,
        "key_offset": offset,
    }
    if in_batch and m and draw.chance(0.3):
        a["queue"] = None
    elif draw.chance(0.3):
        number = draw.of(0, 1, K // 2, K)
        a["num_valid"] = torch.tensor([number]) if draw.chance() else number
    if draw.chance(0.4):
        names = draw.of(1, 5, 100, 2**62)
        separate = in_batch and draw.chance()
        a["query_ids"] = draw.integers(-1, names, m if in_batch and not separate else n)
        if separate:
            a["key_ids"] = draw.integers(-1, names, m)
        if a["queue"] is not None:
            a["queue_ids"] = draw.integers(-1, names, K)
    temperature = draw.of(0.07, draw.power(-2, 1), draw.power(-2, 1), draw.power(-30, 30))
    a["temperature"] = draw.of(temperature, torch.tensor(temperature), torch.tensor([temperature]))
    if n > 1 and draw.chance(0.2):
        a["temperature"] = torch.from_numpy(draw.power(-2, 1) * draw.rng.uniform(0.5, 2, n)).float()
    return a


class Scores:
    """All scores of a problem in float64, over the columns [keys, queue], of which each row sees some."""

    def __init__(self, a: dict[str, Any]):
        self.query, self.query_norm = unit_rows(wide(a["query"]))
        key = wide(a["query"][:0] if a["key"] is None else a["key"])
        self.key, self.key_norm = unit_rows(key)
        if not a["normalize"]:
            self.query, self.key = wide(a["query"]), key
            self.query_norm, self.key_norm = (np.ones((len(x), 1)) for x in (self.query, self.key))
        n, m = len(self.query), len(self.key)
        queue = self.key[:0] if a["queue"] is None else wide(a["queue"])[: a.get("num_valid")]
        self.candidates = np.concatenate([self.key, queue])
        temperature = a["temperature"]
        self.T = np.broadcast_to(wide(temperature) if isinstance(temperature, Tensor) else temperature, n)
        with np.errstate(invalid="ignore"):
            self.scores = self.query @ self.candidates.T / self.T[:, None]
        rows = np.arange(n)
        self.bad = ~np.isfinite(self.query).all(1)  # rows that become NaN as a whole
        self.own = np.zeros(self.scores.shape, bool)  # each row's own key
        if a["key"] is not None:
            self.own[rows, a["key_offset"] + rows] = True
        self.others = np.ones_like(self.own)
        self.others[:, :m] = a["in_batch"]
        self.others &= ~self.own
        self.same = np.zeros_like(self.own)
        if "query_ids" in a:
            ids = wide_ids(a["query_ids"])
            shared = a["in_batch"] and "key_ids" not in a
            of_keys = ids if shared else wide_ids(a["key_ids"]) if "key_ids" in a else np.full(m, -1)
            of_queue = wide_ids(a["queue_ids"])[: len(queue)] if "queue_ids" in a else np.full(len(queue), -1)
            of_rows = ids[a["key_offset"] :][:n] if shared else ids
            self.same = (of_rows[:, None] == np.concatenate([of_keys, of_queue])) & (of_rows >= 0)[:, None]
            self.same &= self.others


def wide_ids(ids: Tensor) -> np.ndarray:
    return ids.numpy().astype(np.int64)


def softmax(scores: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Zeros of nothing."""
    scores = np.where(seen, scores, -np.inf)
    top = scores.max(1, initial=-np.inf, keepdims=True)
    with np.errstate(invalid="ignore"):
        weights = np.where(seen, np.exp(scores - np.where(top == -np.inf, 0.0, top)), 0.0)
        total = weights.sum(1, keepdims=True)
        return np.where(seen, weights / np.where(total == 0, 1.0, total), 0.0)


def weighted(weights: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """weights @ rows, where NaN times 0 is 0."""
    bad = ~np.isfinite(rows).all(1)
    total = weights @ np.where(bad[:, None], 0.0, rows)
    total[(weights[:, bad] != 0).any(1) | np.isnan(weights).any(1)] = math.nan
    return total


def info_nce(draw: Draw) -> None:
    a = contrast(draw)
    n, c = a["query"].shape
    has_ids = "query_ids" in a
    kind = draw.of("plain", "plain", "smooth", "target", "no key", "decoupled")
    if has_ids:
        a["same_id"] = draw.of("mask", "positive")
    extra = a.get("same_id") == "positive"
    if extra and draw.chance():
        a["positives"] = "sum"
    if kind == "smooth" and "positives" not in a:
        a["label_smoothing"] = draw.of(0.1, 0.9)
    elif kind == "decoupled" and not extra:
        a["own_key"] = "decoupled"
    elif kind in ("target", "no key"):
        if not extra:
            target_type = torch.float64 if a["query"].dtype == torch.float64 else draw.of(torch.float32, *HALF)
            a["target"] = draw.tensor(draw.rng.standard_normal((n, c)), target_type)
        if kind == "no key" and a["in_batch"]:
            a["own_key"] = "excluded"
        elif kind == "no key":
            a["key"] = None
    reduction = draw.of("mean", "sum", "none")
    s = Scores(a)
    draw.call = describe("info_nce", a | {"reduction": reduction})

    # The definitions.
    own_key, target = a.get("own_key", "positive"), a.get("target")
    has_own = a["key"] is not None and own_key != "excluded"
    own = s.own if has_own else np.zeros_like(s.own)
    seen = s.others | own
    seen &= ~(s.same if a.get("same_id") == "mask" else np.zeros_like(own))
    positive = own | (s.same if extra else np.zeros_like(own))
    if own_key == "decoupled":
        seen &= ~own
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        lse = log_sum_exp(s.scores, seen)
        count = positive.sum(1)
        smoothing = a.get("label_smoothing", 0.0)
        if target is not None:
            share = np.zeros_like(s.scores)
        elif a.get("positives") == "sum":
            share = softmax(s.scores, positive)
        else:
            share = (1 - smoothing) * positive / np.maximum(count, 1)[:, None]
            share = share + smoothing * seen / np.maximum(seen.sum(1), 1)[:, None]
        p = softmax(s.scores, seen)
        if target is not None:
            target_logit = (s.query * wide(target)).sum(1) / s.T
        elif a.get("positives") == "sum":
            target_logit = log_sum_exp(s.scores, positive)
        else:
            target_logit = np.where(share != 0, share * s.scores, 0.0).sum(1)
        has_target = (count > 0) | (target is not None)
        losses = np.where(has_target, lse - target_logit, 0.0)
        own_logit = np.where(own, s.scores, 0.0).sum(1) if has_own else np.where(has_target, target_logit, 0.0)
        above = (s.scores > own_logit[:, None]) & seen & ~positive
        rank = above.sum(1) if has_own or target is not None else np.full(n, -1)
        upstream = draw.rng.standard_normal(n if reduction == "none" else ())
        upstream = np.float64(np.float32(upstream))
        scale = upstream / (n if reduction == "mean" else 1) * has_target.astype(float)
        difference = np.where(has_target[:, None], p - share, 0.0)
        g = weighted(difference, s.candidates)
        if target is not None:
            g -= wide(target)
        g *= (scale / s.T)[:, None]
        g_query = through_norm(s.query, s.query_norm, g) if a["normalize"] else g
        if not has_target.all():
            g_query[~has_target] = 0
        g_key = weighted((difference * (scale / s.T)[:, None])[:, : len(s.key)].T, s.query)
        g_key = through_norm(s.key, s.key_norm, g_key) if a["normalize"] else g_key
        g_temperature = -(s.query * g).sum(1) / s.T
        g_temperature[~has_target] = 0

    # The operator.
    gradient_of = {"query": a["query"]}
    if a["key"] is not None and not (a["in_batch"] and target is not None):
        gradient_of["key"] = a["key"]
    if isinstance(a["temperature"], Tensor):
        gradient_of["temperature"] = a["temperature"]
    chosen = [name for name in gradient_of if draw.chance(0.8)] or ["query"]
    inputs = {name: gradient_of[name].detach().requires_grad_() for name in chosen}
    loss, stats = moco_ext.info_nce(reduction=reduction, return_stats=True, **(a | inputs))
    up = torch.from_numpy(np.asarray(upstream)).to(loss.dtype)
    grads = dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values()), up), strict=True))

    # The bounds.
    is_wide = any(x is not None and x.dtype == torch.float64 for x in (a["query"], a["key"], a["queue"], target))
    expect(loss.dtype == (torch.float64 if is_wide else torch.float32), f"loss is {loss.dtype}")
    bad = s.bad | (has_own & ~np.isfinite(np.where(own, s.scores, 0.0).sum(1)))
    losses = np.where(bad & has_target, math.nan, losses)
    lse, own_logit = (np.where(bad, math.nan, x) for x in (lse, own_logit))
    bad |= ~np.isfinite(losses) | ~np.isfinite(lse)
    with np.errstate(invalid="ignore", over="ignore"):
        longest = np.nan_to_num(lengths(s.candidates)).max(initial=0.0)
        if target is not None:
            longest = max(longest, lengths(wide(target)).max(initial=0.0))
        query_length = lengths(s.query)
        L = np.nan_to_num(query_length * longest / s.T)
        unit = 1e-13 if is_wide else 1e-5
        tol = unit * np.maximum(L / 20, 1)
        size = tol * np.maximum(L, 1)
        size[bad & ~has_target] = math.inf  # 0 or NaN
        close(stats.loss, losses, size, "stats.loss")
        close(stats.lse, lse, size, "stats.lse")
        close(stats.positive_logit, own_logit, np.where(bad, math.inf, size), "stats.positive_logit")
        total = {"mean": losses.mean() if n else math.nan, "sum": losses.sum(), "none": losses}[reduction]
        total_size = {"mean": size.mean() if n else 0, "sum": size.sum(), "none": size}[reduction]
        close(loss, np.asarray(total), total_size + 1e-6 * np.abs(total), "loss")
        near = ((np.abs(s.scores - own_logit[:, None]) <= size[:, None]) & seen & ~positive).sum(1)
    got_rank = stats.rank.numpy()
    expect(bad | (np.abs(got_rank - rank) <= near), f"rank {got_rank.tolist()}, expected {rank.tolist()} +- {near}")
    per_row = np.abs(scale) / s.T
    sizes = {"query": per_row * longest / s.query_norm[:, 0], "temperature": per_row * L}
    bounds = {name: size * tol for name, size in sizes.items()}
    bounds["temperature"] += 1e-6 * sizes["temperature"]  # a temperature in float32
    # Intermediate results below the smallest normal number are flushed to 0, and then divided by norm or temperature.
    tiny = 8 * torch.finfo(torch.float64 if is_wide else torch.float32).smallest_normal
    bounds["query"] += tiny / s.query_norm[:, 0]
    bounds["temperature"] += tiny * (1 + c * query_length / s.T)
    if "key" in grads:
        per_row = per_row * query_length
        for of, x in ((sizes, per_row), (bounds, per_row * tol)):
            of["key"] = (x.sum() if a["in_batch"] else x) / s.key_norm[:, 0]
        bounds["key"] += tiny * (n if a["in_batch"] else 1) / s.key_norm[:, 0]
    wants = {"query": g_query, "key": g_key, "temperature": g_temperature}
    for name, grad in grads.items():
        # Beyond it, intermediate results may overflow.
        limit = torch.finfo(torch.float64 if is_wide and grad.dtype == torch.float64 else torch.float32).max / 100
        expect(grad.dtype == gradient_of[name].dtype, f"{name}.grad is {grad.dtype}")
        want, unknown = wants[name], bad if name != "key" or not a["in_batch"] else np.full(len(s.key), bad.any())
        bound = np.where(unknown | ~(sizes[name] < limit), math.inf, bounds[name])
        if name == "temperature" and grad.numel() == 1 and n != 1:
            want, bound = want.sum(keepdims=True), bound.sum(keepdims=True)
        close(grad.reshape(want.shape), want, bound[:, None] if want.ndim == 2 else bound, f"{name}.grad")


def expected_key(draw: Draw) -> None:
    a = contrast(draw)
    if a["in_batch"]:
        a["own_key"] = draw.of("positive", "excluded")
    elif draw.chance():
        a["key"] = None
    s = Scores(a)
    seen = (s.others & ~s.same) | (s.own if a.get("own_key") != "excluded" else False)
    draw.call = describe("expected_key", a)
    got = moco_ext.expected_key(**a)
    with np.errstate(invalid="ignore", over="ignore"):
        lse = log_sum_exp(s.scores, seen)
        want = weighted(softmax(s.scores, seen), s.candidates)
        unknown = s.bad & ~seen.any(1)  # NaN, or as without candidates
        want[s.bad], lse[s.bad] = math.nan, math.nan
        is_wide = any(x is not None and x.dtype == torch.float64 for x in (a["query"], a["key"], a["queue"]))
        longest = np.nan_to_num(lengths(s.candidates)).max(initial=0.0)
        L = np.nan_to_num(lengths(s.query) * longest / s.T)
        tol = (1e-13 if is_wide else 1e-5) * np.maximum(L / 20, 1)
    tol[unknown] = math.inf
    close(got.lse, lse, tol * np.maximum(L, 1), "lse")
    close(got.keys, want, tol[:, None] * max(longest, 1e-300), "keys")


def nearest_keys(draw: Draw) -> None:
    big = draw.chance(0.01)
    n, K, c = draw.of(*ROWS), draw.of(1, 2, 64, 65, draw.integer(1, 2000)), draw.of(*FEATURES)
    if big:
        n, K, c = draw.integer(1, 700), draw.integer(4000, 20000), 64
    whole = draw.chance(0.4)  # small whole numbers: many equal scores, all exact
    normalize = not whole and draw.chance()
    types = [draw.of(torch.float32, *HALF) for _ in range(2)]
    if draw.chance(0.15):
        types = [torch.float64, draw.of(torch.float32, torch.float64)]
    rows = [draw.rng.integers(-2, 3, (size, c)).astype(float) for size in (n, K)]
    if not whole:
        rows = [feature_rows(draw, n, c, types[0], normalize), unit_rows(draw.rng.standard_normal((K, c)))[0]]
    if draw.chance(0.2):
        rows[1][draw.integer(0, K - 1)] = math.nan
    query, queue = draw.tensor(rows[0], types[0]), draw.tensor(rows[1], types[1], contiguous=True)
    k = draw.of(1, K, draw.integer(1, K), min(K, 10))
    valid = draw.of(0, 1, K // 2, K) if draw.chance(0.3) else K
    num_valid = draw.of(valid, torch.tensor([valid])) if valid < K else None
    draw.call = describe(
        "nearest_keys", {"query": query, "queue": queue, "k": k, "normalize": normalize, "valid": valid}
    )
    similarity, index = moco_ext.nearest_keys(query, queue, k, normalize=normalize, num_valid=num_valid)
    found = min(k, valid)
    expect(bool((index[:, found:] == -1).all() and (similarity[:, found:] == -math.inf).all()), "beyond num_valid")
    similarity, index = similarity[:, :found], index[:, :found].numpy()
    q = wide(query)
    q = unit_rows(q)[0] if normalize else q
    with np.errstate(invalid="ignore"):
        scores = q @ wide(queue)[:valid].T
    scores = np.where(np.isnan(q).any(1)[:, None] | np.isnan(wide(queue)[:valid]).any(1), math.nan, scores)
    order = np.argsort(np.where(np.isnan(scores), -math.inf, -scores), axis=1, kind="stable")[:, :found]
    size = np.sqrt((np.nan_to_num(q) ** 2).sum(1, keepdims=True)) * np.sqrt(
        np.nan_to_num(wide(queue) ** 2).sum(1).max()
    )
    bound = 0.0 if whole else size * (1e-13 if torch.float64 in types else 1e-6)
    close(similarity, np.take_along_axis(scores, order, 1), bound, "similarity")
    close(similarity, np.take_along_axis(scores, index, 1), bound, "similarity of index")
    expect(np.diff(np.sort(index, 1), axis=1) > 0, "a key twice")
    expect(not whole or np.array_equal(index, order), "the order of equal scores")


def enqueue(draw: Draw) -> None:
    K, B, c = draw.integer(1, 40), draw.of(0, 1, draw.integer(0, 100)), draw.of(*FEATURES)
    types = [draw.of(torch.float32, *HALF) for _ in range(2)]
    if draw.chance(0.1):
        types = [torch.float64] * 2
    normalize = draw.chance()
    keys = draw.tensor(feature_rows(draw, B, c, types[1], normalize), types[1])
    total, first = (K, 0) if draw.chance() else (K + draw.integer(0, 50), 0)
    first = draw.integer(0, total - K)
    queue = draw.tensor(draw.rng.standard_normal((K, c)), types[0], contiguous=True)
    ptr = draw.of(draw.integer(-3 * total, 3 * total), draw.integer(-(2**62), 2**62))
    queue_ptr = torch.tensor([ptr])
    draw.call = describe("enqueue_", {"queue": queue, "keys": keys, "ptr": ptr, "normalize": normalize,
                                 "row_offset": first, "K": total})  # fmt: skip
    _, before = draw.guards[-1]
    want = wide(queue).copy()
    with np.errstate(invalid="ignore"):
        rows = unit_rows(wide(keys))[0] if normalize else wide(keys)
    written = np.zeros(K, bool)
    for i, row in enumerate(rows):
        if 0 <= (slot := (ptr + i) % total - first) < K:
            want[slot], written[slot] = row, True
    moco_ext.enqueue_(queue, queue_ptr, keys, normalize=normalize, row_offset=first, K=total)
    expect(queue_ptr.item() == (ptr + B) % total, f"pointer {queue_ptr.item()}, expected {(ptr + B) % total}")
    exact = torch.from_numpy(want).to(queue.dtype)
    if normalize:
        close(queue, want, np.where(written[:, None], 1e-15 if types[0] == torch.float64 else 1e-6, 0.0), "queue")
    else:
        expect(torch.equal(queue.nan_to_num(7.0), exact.nan_to_num(7.0)), "rows are not the keys' rounded values")
    before[queue.storage_offset() :][: queue.numel()] = queue.flatten()  # what lies around it must be as before


def momentum_update(draw: Draw) -> None:
    keys, queries, copies = [], [], []
    with_copies, float64 = draw.chance(0.4), draw.chance(0.15)
    for _ in range(draw.integer(1, 8)):
        shape = tuple(draw.of(0, 1, 2, 3, 7, 64, 129) for _ in range(draw.integer(0, 3)))
        if draw.chance(0.01):
            shape = (draw.integer(30_000, 150_000),)
        key_type, query_type = (draw.of(torch.float32, torch.float32, *HALF) for _ in range(2))
        if float64:
            key_type = query_type = torch.float64
        elif with_copies:
            key_type = torch.float32
        for tensors, dtype in ((keys, key_type), (queries, query_type), (copies, draw.of(*HALF))):
            values = draw.rng.standard_normal(shape) * (
                draw.power(-3, 3) if dtype == torch.float16 else draw.power(-30, 30)
            )
            if values.size and draw.chance(0.05):
                values.flat[draw.integer(0, values.size - 1)] = math.nan
            tensors.append(draw.tensor(values, dtype, contiguous=True))
        if len(shape) > 1 and draw.chance(0.3):
            for tensors in (keys, queries, copies):
                tensors[-1] = tensors[-1].transpose(0, 1)
    copies = copies if with_copies and not float64 else []
    m = draw.of(0.0, 0.5, 0.999, 1.0, draw.rng.random())
    m_given = torch.tensor(m, dtype=torch.float64) if draw.chance() else m
    draw.call = describe("momentum_update_", {"keys": keys, "queries": queries, "m": m_given, "copies": copies})
    written = {x.untyped_storage().data_ptr() for x in [*keys, *copies]}
    old = [(wide(k).copy(), wide(q).copy()) for k, q in zip(keys, queries, strict=True)]
    moco_ext.momentum_update_(keys, queries, m_given, low_precision=copies)
    with np.errstate(over="ignore"):
        for key, (before, query) in zip(keys, old, strict=True):
            unit = 2.0**-52 if key.dtype == torch.float64 else 2.0**-23
            want = m * before + (1 - m) * query
            close(key, want, 2 * unit * np.nan_to_num(np.abs(before) + np.abs(query)), "key")
    for key, copy in zip(keys, copies, strict=False):
        expect(torch.equal(copy.nan_to_num(7.0), key.to(copy.dtype).nan_to_num(7.0)), "a copy is not its rounded key")
    for buffer, before in draw.guards:  # what lies around the written elements must be as before
        if buffer.untyped_storage().data_ptr() in written:
            for x in [*keys, *copies]:
                if x.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr():
                    before.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)


def l2_normalize(draw: Draw) -> None:
    n, c = draw.of(*ROWS), draw.of(0, *FEATURES)
    dtype = draw.of(torch.float32, torch.float32, *HALF, torch.float64)
    values = feature_rows(draw, n, c, dtype, True) if c else np.zeros((n, 0))
    x = draw.tensor(values, dtype)
    eps = draw.of(1e-12, 1e-12, 0.0, 1.0, 1e3, draw.power(-20, 20))
    draw.call = describe("l2_normalize", {"x": x, "eps": eps})
    leaf = x.detach().requires_grad_()
    got = moco_ext.l2_normalize(leaf, eps)
    rows = wide(x)
    upstream = torch.from_numpy(draw.rng.standard_normal(rows.shape)).to(dtype)
    (grad,) = torch.autograd.grad(got, leaf, upstream)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        norm = np.sqrt((rows * rows).sum(1, keepdims=True))
        floored = np.maximum(norm, eps)
        want = rows / floored
        along = np.where(norm > eps, (wide(upstream) * want).sum(1, keepdims=True), 0.0)
        want_grad = (wide(upstream) - along * want) / floored
    unit = 1e-14 if dtype == torch.float64 else 1e-6  # the sums of squares differ in their order
    close(got, want, unit * np.nan_to_num(np.abs(want)), "value")
    size = np.sqrt((wide(upstream) ** 2).sum(1, keepdims=True)) * 4
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        bound = np.nan_to_num(unit * size / floored, posinf=0)
    if bool(((norm > 1e-18) & (norm < 1e18)).all()) or dtype == torch.float64:  # torch's norm squares in float32
        close(grad, want_grad, bound, "gradient")


def colors(draw: Draw) -> None:
    n, height, width = draw.of(0, 1, 2, 5), draw.of(1, 2, 3, 17, 40), draw.of(1, 2, 15, 16, 33, 64, 70)
    count, taps = draw.integer(0, 8), draw.of(1, 3, 5, 23, 99)
    images = torch.from_numpy(draw.rng.integers(0, 256, (n, 3, height, width), dtype=np.uint8))
    if draw.chance():
        images = images.contiguous(memory_format=torch.channels_last)
    steps = torch.from_numpy(draw.rng.integers(-1, 8, (n, count)))
    factors = draw.tensor(draw.rng.uniform(0, 2, (n, 4)) - [0, 0, 0, 1], torch.float32)
    weights = draw.rng.random((n, (taps + 1) // 2))
    if taps > 4 and draw.chance():
        weights[:, : draw.integer(1, taps // 2)] = 0
    weights = np.concatenate([weights, weights[:, -2::-1]], 1)
    kernels = draw.tensor(weights / weights.sum(1, keepdims=True), torch.float32)
    draw.call = describe("color_steps", {"images": images, "steps": steps.tolist(), "kernels": kernels})
    got = color_steps(images, steps, factors, kernels)
    expect(got.shape == images.shape and got.dtype == torch.uint8, "shape or dtype")
    for i in range(n):
        view, sensitive = wide(images[i]) / 255, np.zeros((3, height, width), bool)
        brightness, contrast_, saturation, turn = wide(factors[i])
        slack = 1e-3
        for step in steps[i].tolist():
            luma = np.tensordot([0.299, 0.587, 0.114], view, 1)
            if step == 0:
                view = np.clip(view * brightness, 0, 1)
            elif step == 1:
                view = np.clip(view * contrast_ + luma.mean() * (1 - contrast_), 0, 1)
            elif step == 2:
                view = np.clip(luma + saturation * (view - luma), 0, 1)
            elif step == 3:
                # Hue is not continuous in gray, where its error is that of a channel over the chroma.
                chroma = np.ptp(view, axis=0)
                view, slack = hue(view, turn), slack + 1e-3
                sensitive |= chroma < 1e-3
            elif step == 4:
                view = np.stack([luma] * 3)
            elif step == 5:
                view, sensitive = blurred(view, wide(kernels[i]), sensitive)
            elif step == 6:
                sensitive = sensitive | (np.abs(view - 0.5) < 1e-5)
                view = np.where(view < 0.5, view, 1 - view)
            elif step == 7:
                view, sensitive = view[:, :, ::-1], sensitive[:, :, ::-1]
            if sensitive.any() and step == 1:
                sensitive = np.ones_like(sensitive)
            elif step in (2, 3, 4):
                sensitive = np.stack([sensitive.any(0)] * 3)
        wrong = np.abs(wide(got[i]) - 255 * view) > 0.5 + slack
        expect(~wrong | sensitive, f"view {i}: {int((wrong & ~sensitive).sum())} bytes differ")


def hue(view: np.ndarray, turn: float) -> np.ndarray:
    """Through HSV, as colorsys defines it."""
    high, low = view.max(0), view.min(0)
    chroma = np.where(high > low, high - low, 1.0)
    r, g, b = (high - view) / chroma
    h = np.select([view[0] == high, view[1] == high], [b - g, 2 + r - b], 4 + g - r)
    h = np.where(high > low, h / 6, 0.0) + turn
    channels = []
    for shift in (5, 3, 1):  # value - chroma * max(0, min(k, 4 - k, 1))
        k = (shift + h * 6) % 6
        channels.append(high - (high - low) * np.clip(np.minimum(k, 4 - k), 0, 1))
    return np.stack(channels)


def blurred(view: np.ndarray, kernel: np.ndarray, sensitive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    radius = len(kernel) // 2
    for axis in (1, 2):
        pad = [(radius, radius) if d == axis else (0, 0) for d in range(3)]
        padded, unsure = np.pad(view, pad, mode="edge"), np.pad(sensitive, pad, mode="edge")
        shifted = [np.take(padded, np.arange(t, t + view.shape[axis]), axis) for t in range(len(kernel))]
        view = sum(w * x for w, x in zip(kernel, shifted, strict=True))
        sensitive = np.any([np.take(unsure, np.arange(t, t + view.shape[axis]), axis) for t in range(len(kernel))], 0)
    return view, sensitive


def describe(name: str, arguments: dict[str, Any]) -> str:
    def text(x: Any) -> str:
        if isinstance(x, Tensor):
            return f"{str(x.dtype)[6:]}{list(x.shape)}/{list(x.stride())}"
        return f"[{', '.join(map(text, x))}]" if isinstance(x, list) else f"{x:.4g}" if isinstance(x, float) else f"{x}"

    return f"{name}({', '.join(f'{key}={text(x)}' for key, x in arguments.items())})"


OPERATORS: tuple[Callable[[Draw], None], ...] = (
    info_nce, info_nce, info_nce, expected_key, nearest_keys, enqueue, momentum_update, l2_normalize, colors,
)  # fmt: skip


def one_call(seed: int, number: int) -> tuple[str, str]:
    """The operator's name, and what is wrong."""
    draw = Draw(seed, number)
    operator = OPERATORS[number % len(OPERATORS)]
    torch.set_num_threads(draw.of(1, 1, 1, 1, 2, 3))
    wrong = ""
    try:
        operator(draw)
        draw.unchanged()
    except Exception as error:  # any exception is a finding
        wrong = f"{type(error).__name__}: {error} in {draw.call}"
    return operator.__name__, wrong


def campaign(args: argparse.Namespace) -> dict[str, Any]:
    isa, counts = build_info()["instruction_set"], {}
    ends, number = time.monotonic() + args.seconds, args.first
    while number < args.first + args.count if args.count else time.monotonic() < ends:
        name, wrong = one_call(args.seed, number)
        of = counts.setdefault(name, {"calls": 0, "different": 0})
        of["calls"] += 1
        of["different"] += wrong != ""
        if wrong:
            again = f"--seed {args.seed} --first {number} --count 1"
            print(f"MOCO_EXT_ISA={isa} python tools/fuzz.py {again}  # {wrong}", flush=True)
        number += 1
    return {"isa": isa, "counts": counts}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="in all, of the instruction sets of this processor")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    parser.add_argument("--count", type=int, default=0, help="calls; default: as many as --seconds allows")
    parser.add_argument("--out", type=Path, help="JSON; results of other seeds in it are kept")
    args = parser.parse_args()
    results = read_json(args.out).get("settings", {}) if args.out else {}
    if "MOCO_EXT_ISA" in os.environ:
        found = [campaign(args)]
    else:
        found = []
        args.seconds /= len(INSTRUCTION_SETS)
        for isa in INSTRUCTION_SETS:
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, __file__, "--seconds", f"{args.seconds}", "--seed", f"{args.seed}"]
                command += ["--first", f"{args.first}", "--count", f"{args.count}", "--out", f"{folder}/out.json"]
                subprocess.run(command, env=os.environ | {"MOCO_EXT_ISA": isa}, check=False)
                results |= read_json(Path(folder) / "out.json")["settings"]
    for one in found:
        for name, counts in one["counts"].items():
            results[f"{name}, {one['isa']}, seed {args.seed}"] = counts
    total = {name: sum(counts[name] for counts in results.values()) for name in ("calls", "different")}
    if args.out:
        write_json(args.out, {"settings": results, "total": total, "made_with": environment(torch.device("cpu"))})
    print(total)
    return int(total["different"] > 0)


if __name__ == "__main__":
    sys.exit(main())
