"""Installed versions, libraries and GPUs, and a numerical self-test: ``moco-ext info``."""

from __future__ import annotations

import argparse
import json
import platform
import time
from typing import Any

import torch

from .. import __version__, library, ops, reference, tiled


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = "Print versions, libraries and devices, and run a self-test of about a second."
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print :func:`collect`; 0 if the self-test passed, else 1."""
    facts = collect()
    passed = all(test["passed"] for test in facts["self_test"].values())
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        _show(facts, passed)
    return 0 if passed else 1


def collect() -> dict[str, Any]:
    """Versions, libraries, instruction set, GPUs, and a self-test of about a second, as a JSON-serializable dict.

    ``self_test`` maps ``"op on device"`` to its relative error against float64, the tolerance, and whether it passed.
    """
    build = library.build_info()
    libraries = sorted(library.LIBRARY_FOLDER.glob(f"*{library.SUFFIX}"))
    gpus = [_describe_gpu(i) for i in range(torch.cuda.device_count())]
    started = time.perf_counter()
    tests = {}
    for device in ["cpu", *(["cuda"] if gpus and library.has_cuda_kernels() else [])]:
        tests.update(_self_test(torch.device(device)))
    return {
        "moco_ext": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "location": str(library.LIBRARY_FOLDER.parent),
        "libraries": [path.name for path in libraries],
        "built_with": {
            "compiler": build["compiler"],
            "cuda_compiler": build["cuda_compiler"] or None,
            "torch_headers": build["torch_headers"],
            "torch_at_least": build["torch_target"],
        },
        "cuda_archs": build["cuda_archs"].split(),
        "cuda_library_loaded": library.has_cuda_kernels(),
        "tiled_devices": tiled.devices(),
        "cpu_instruction_set": build["instruction_set"],
        "cpu_threads": torch.get_num_threads(),
        "gpus": gpus,
        "self_test": tests,
        "self_test_seconds": round(time.perf_counter() - started, 2),
    }


def _show(facts: dict[str, Any], passed: bool) -> None:
    built = facts["built_with"]
    archs = ", ".join(facts["cuda_archs"])
    rows = [
        ("moco_ext", f"{facts['moco_ext']} in {facts['location']}"),
        ("python, torch", f"{facts['python']}, {facts['torch']} (CUDA: {facts['torch_cuda'] or 'none'})"),
        (
            "built with",
            f"{built['compiler']}, torch {built['torch_headers']} headers; runs on torch >= {built['torch_at_least']}",
        ),
        ("libraries", ", ".join(facts["libraries"])),
        ("CPU", f"{facts['cpu_instruction_set']} kernels, {facts['cpu_threads']} threads"),
        ("CUDA kernels", f"{archs} ({built['cuda_compiler']})" if archs else "none: built for the CPU only"),
    ]
    if archs and not facts["cuda_library_loaded"]:
        rows.append(("", "not loaded: this torch build has no CUDA"))
    rows.append(("plain torch", f"on {', '.join(facts['tiled_devices'])}: no kernels, see docs/kernels.md"))
    rows += [("GPU", gpu) for gpu in facts["gpus"]] or [("GPU", "none")]
    for name, value in rows:
        print(f"{name:<15}{value}")
    for name, test in facts["self_test"].items():
        verdict = "ok" if test["passed"] else "WRONG"
        print(f"{'self-test':<15}{name:<36}{verdict:<7}relative error {test['relative_error']:.1e}")
    print(f"{'':<15}{'passed' if passed else 'FAILED'} in {facts['self_test_seconds']} s")


def _describe_gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    return f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"


def _self_test(device: torch.device) -> dict[str, dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def error(ours: torch.Tensor | None, exact: torch.Tensor | None) -> float:
        assert ours is not None and exact is not None
        ours = ours.detach().double().cpu()
        return ((ours - exact).norm() / exact.norm()).item()

    query, key, queue = random(40, 128), random(40, 128), reference.l2_normalize(random(3000, 128))
    errors = {}
    exact_query = query.double().requires_grad_()
    exact_loss = reference.info_nce(exact_query, key.double(), queue.double())
    assert isinstance(exact_loss, torch.Tensor)
    exact_loss.backward()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        q = query.to(device, copy=True).requires_grad_()
        loss = ops.info_nce(q, key.to(device), queue.to(device, dtype))
        loss.backward()
        name = f"info_nce ({str(dtype).removeprefix('torch.')} queue)"
        errors[name] = max(error(loss, exact_loss.detach()), error(q.grad, exact_query.grad)), tolerance

    stored, pointer = random(50, 16).to(device), torch.tensor([45], device=device)
    expected, expected_pointer = stored.cpu().double(), torch.tensor([45])
    keys = random(20, 16)
    ops.enqueue_(stored, pointer, keys.to(device), normalize=True)
    reference.enqueue_(expected, expected_pointer, keys.double(), normalize=True)
    errors["enqueue_"] = error(stored, expected) + abs(pointer.item() - expected_pointer.item()), 1e-6

    moved, towards = random(1001).to(device), random(1001)
    expected = moved.cpu().double()
    ops.momentum_update_([moved], [towards.to(device)], 0.9)
    reference.momentum_update_([expected], [towards.double()], 0.9)
    errors["momentum_update_"] = error(moved, expected), 1e-6

    errors["l2_normalize"] = error(ops.l2_normalize(query.to(device)), reference.l2_normalize(query.double())), 1e-6
    return {
        f"{name} on {device}": {"relative_error": value, "tolerance": tolerance, "passed": value <= tolerance}
        for name, (value, tolerance) in errors.items()
    }
