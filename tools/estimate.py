"""Counts the instructions of the InfoNCE passes by pipe, and estimates their time on an H200 from the counts.

    python tools/estimate.py [FILE ...]          # the CUDA library or cubins; prints the tables
    python tools/estimate.py [LIBRARY] --write   # updates bench/results/sass.json and docs/kernels.md
    python tools/estimate.py [LIBRARY] --check   # fails if they differ from the library

The counts are exact for one version of nvcc. The estimate is a model, not a measurement.

It counts one iteration of the main loop, for one warp. The main loop is the innermost loop with tensor instructions; if
there are several, the one with the most. The Hopper kernel for wide rows has two main loops, in different warpgroups;
one warp of each is counted. Code that a forward branch can skip is rare if it has no tensor instructions and no copies:
masks, the end of the last tile, a new maximum. Rare code is counted separately and costs nothing in the estimate. A
nested loop counts once; the estimate multiplies the one that splits float32 keys.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from check_sass import cuobjdump, find_architectures, split_functions

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "sass.json"
MEASURED = ROOT / "bench" / "results" / "gpu-1.json"
PROBED = {"bf16": "bfloat16", "float32": "float32 3", "tf32": "float32 2"}  # the queues of SHAPES in its cases' names
PAGE = ROOT / "docs" / "kernels.md"
ARCHITECTURES = ("sm_80", "sm_90a")
KERNELS = r"info_nce_(mma|sm90|sm90_wide)_kernel"

# Opcode -> pipe; others only take an issue slot.
PIPES = {
    "tensor": r"HG?MMA",
    "fma": r"FADD|FMUL|FFMA|HADD2|HMUL2|HFMA2",
    "imad": r"IMAD",  # the heavy half of the FMA pipe
    "alu": r"FMNMX|FSETP|FSET|FSEL|ISETP|IADD3?|IABS|IMNMX|VI\w+|LOP3|PLOP3|SHF|LEA|PRMT|SEL|MOV|F2FP|P2R|R2P",
    "mufu": r"MUFU|F2F|F2I|I2F",
    "shared": r"LDSM|LDS|STS|STSM|LDGSTS|SHFL",
    "uniform": r"U[A-Z]\w+|R2UR|S2UR|VOTEU",
}

# An H200. A multiprocessor has 4 schedulers, each with its own pipes, which issue one instruction per cycle.
MULTIPROCESSORS = 132
CLOCK = 1755.0  # cycles per us under load; up to 1,980 without
# Cycles of a pipe per warp instruction: 32 lanes over the results per cycle and scheduler (CUDA programming guide,
# throughput of native arithmetic instructions, 9.0: 128 float, 64 integer, 16 special per multiprocessor).
CYCLES = {"fma": 1, "imad": 2, "alu": 2, "mufu": 8}
TENSOR_FMAS = 512  # 16-bit, per cycle and scheduler: 989 TFLOP/s; half of it for tf32
# Reached: 790 of 949 TFLOP/s at this clock were measured with warpgroup instructions (power limits them). mma.sync
# reaches 62 % of the peak on Hopper (Luo et al., arXiv:2402.13499).
TENSOR_REACHED = {"HGMMA": 0.83, "HMMA": 0.62}
SHARED_BYTES = 128  # per cycle of a multiprocessor, without bank conflicts
STALLS = 1.2  # time over the busiest pipe's at worst, for barriers and latencies; assumed
HBM = 4.3e6  # bytes per us; measured by a copy
# Assumed: prepare, pass and combine at 1 us each, and the first tile's latency. Partial sums are written and read.
# Measured: 3.5 us for prepare, 6.7 us for combine (N = 256, K = 65,536, C = 128).
FIXED = 3 * 1.0 + 1.5


@dataclass(frozen=True)
class Tile:
    kernel: str  # its name without namespaces, as a pattern
    rows: int  # of a block
    keys: int  # of a tile
    terms: int = 0  # of float32 keys, which a loop writes to shared memory
    products: int = 1 + 1  # per tile, of terms: S and P K. An iteration has one or two tiles


def portable(tile: str) -> str:
    return rf"info_nce_mma_kernel<MmaTile<{tile}>, \d+, \(MmaPass\)1, false>"


def hopper(tile: str) -> str:
    return f"info_nce_sm90_kernel<Sm90Tile<{tile}>, true, false>"


# Queue, C and pass of the goals' kernels. FLOPs of the loop are checked against rows, keys and products.
BF16 = "__nv_bfloat16"
TILES = {
    "bf16, 128, portable": Tile(portable(f"{BF16}, {BF16}, 1, 128"), 128, 32),
    "bf16, 768, portable": Tile(portable(f"{BF16}, {BF16}, 1, 768"), 32, 16),
    "float32, 128, portable": Tile(portable("float, __half, 2, 128"), 64, 16, terms=2, products=3 + 3),
    "tf32, 128, portable": Tile(portable("float, __half, 1, 128"), 128, 32, terms=1),
    "bf16, 128, Hopper": Tile(hopper(f"{BF16}, {BF16}, 1, 128"), 128, 128),
    "bf16, 768, Hopper": Tile(f"info_nce_sm90_wide_kernel<{BF16}, 768, true>", 64, 32),
    "float32, 128, Hopper": Tile(hopper("float, __half, 2, 128"), 128, 64, terms=2, products=3 + 3),
    "tf32, 128, Hopper": Tile(hopper("float, __half, 1, 128"), 128, 64, terms=1),
}
# N, K, C, queue, goal in us. tf32: a float32 queue with at least that accuracy.
SHAPES = [
    (32, 65536, 128, "bf16", 9),
    (256, 65536, 128, "bf16", 18),
    (256, 65536, 128, "float32", 60),
    (256, 65536, 128, "tf32", 34),
    (1024, 65536, 128, "bf16", 54),
    (4096, 65536, 128, "bf16", 205),
    (256, 1048576, 128, "bf16", 205),
    (256, 65536, 768, "bf16", 85),
]


@functools.cache
def pipe_of(opcode: str) -> str:
    return next((pipe for pipe, opcodes in PIPES.items() if re.fullmatch(opcodes, opcode)), "other")


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str  # without the predicate
    predicated: bool
    opcode: str
    target: int | None  # of a branch

    @property
    def pipe(self) -> str:
        return pipe_of(self.opcode)

    @property
    def tensor_fmas(self) -> int:
        """Multiply-adds of one warp; a warp of a warpgroup has 16 of its 64 rows."""
        if match := re.match(r"HGMMA\.64x(\d+)x(\d+)|HMMA\.16(8)(\d+)", self.text):
            columns, depth = (int(number) for number in match.groups() if number)
            return 16 * columns * depth
        return 0

    @property
    def tensor_cycles(self) -> float:
        rate = TENSOR_FMAS / (2 if "TF32" in self.text else 1) * TENSOR_REACHED.get(self.opcode, 1)
        return self.tensor_fmas / rate

    @property
    def shared_bytes(self) -> float:
        """What one warp moves; a quarter of what a warpgroup's product reads."""
        if match := re.match(r"HGMMA\.64x(\d+)x(\d+)", self.text):
            a_from_registers = re.search(r", R\d+, gdesc", self.text)
            return (int(match[1]) + (0 if a_from_registers else 64)) * int(match[2]) * 2 / 4
        if self.pipe != "shared":
            return 0
        if self.opcode in ("LDSM", "STSM"):
            return 128 * int(self.text.split()[0][-1])  # number of matrices
        width = re.search(r"\.(64|128)\b", self.text)
        return 32 * (int(width[1]) // 8 if width else 4)


# The main loop, and the one with the most stores to shared memory, which splits float32 keys into terms. For wide rows,
# the loop of the scores and that of the sums.
Loops = tuple[list[Instruction], list[Instruction]]


def parse(code: str) -> list[Instruction]:
    instructions = []
    for address, predicate, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?(.*?) ?;", code, re.M):
        target = re.match(r"BRA\b.*?(0x[0-9a-f]+)", text)
        opcode = re.split(r"[ .]", text, maxsplit=1)[0]
        instructions.append(
            Instruction(int(address, 16), text, bool(predicate), opcode, int(target[1], 16) if target else None)
        )
    return instructions


def find_loops(instructions: list[Instruction], wanted: str) -> list[list[Instruction]]:
    """The innermost loops with the wanted opcodes, the one with the most first; an empty one if there is none."""

    def wanted_in(loop: list[Instruction]) -> int:
        return sum(re.fullmatch(wanted, i.opcode) is not None for i in loop)

    def contains(outer: list[Instruction], inner: list[Instruction]) -> bool:
        return outer is not inner and outer[0].address <= inner[0].address and inner[-1].address <= outer[-1].address

    loops = []
    for last in instructions:
        if last.target is not None and last.target <= last.address:
            loop = [i for i in instructions if last.target <= i.address <= last.address]
            # Code that was moved out of the loop, behind EXIT, also branches back.
            if wanted_in(loop) and not any(i.opcode == "EXIT" for i in loop):
                loops.append(loop)
    innermost = [loop for loop in loops if not any(contains(loop, other) for other in loops)]
    return sorted(innermost, key=wanted_in, reverse=True) or [[]]


def split_rare(body: list[Instruction]) -> tuple[list[Instruction], list[Instruction]]:
    """The instructions of every iteration, and the rare ones."""
    rare: set[Instruction] = set()
    for branch in body:
        if branch.target is not None and branch.predicated and branch.address < branch.target <= body[-1].address:
            skipped = [i for i in body if branch.address < i.address < branch.target]
            if not any(i.pipe == "tensor" or i.opcode in ("LDGSTS", "UTMALDG") for i in skipped):
                rare.update(skipped)
    return [i for i in body if i not in rare], sorted(rare, key=lambda i: i.address)


def exposed(body: list[Instruction]) -> list[Instruction]:
    """Instructions that run while none of the warpgroup's own products do."""
    found: list[Instruction] = []
    groups = 0
    open_group = False
    for iteration in range(2):  # the first one finds what the second one starts with
        for i in body:
            if i.opcode == "HGMMA":
                open_group = "gsb0" not in i.text
                groups += not open_group
            elif match := re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\d+)", i.text):
                groups = min(groups, int(match[1], 16))
            elif iteration == 1 and groups == 0 and not open_group:
                found.append(i)
    return found


def warp_cycles(instructions: list[Instruction]) -> dict[str, float]:
    """Cycles that each pipe of a scheduler needs for one warp's instructions; shared memory in cycles of a quarter."""
    counts = Counter(i.pipe for i in instructions)
    return {
        "tensor": sum(i.tensor_cycles for i in instructions),
        "fma": counts["fma"] * CYCLES["fma"] + counts["imad"] * CYCLES["imad"],
        "alu": counts["alu"] * CYCLES["alu"],
        "mufu": counts["mufu"] * CYCLES["mufu"],
        "shared": 4 * sum(i.shared_bytes for i in instructions) / SHARED_BYTES,
        "issue": len(instructions),
    }


def read_kernels(path: str) -> tuple[dict, dict[str, Loops], set[str]]:
    """Architecture -> kernel -> counts; for sm_90a, kernel -> instructions of every iteration; versions of ptxas."""
    kernels: dict[str, dict] = {}
    loops = {}
    versions = set()
    in_library = find_architectures(path)
    for architecture in [a for a in ARCHITECTURES if a in in_library] or [None]:
        options = ["-arch", architecture] if architecture else []
        sass = cuobjdump(path, "--dump-sass", *options)
        elf = cuobjdump(path, "--dump-elf", *options)
        usage = cuobjdump(path, "--dump-resource-usage", *options)
        versions |= set(re.findall(r"Tool Version:.*?(V[\d.]+)", elf))
        threads = dict(
            re.findall(r"^\.nv\.info\.(\S+)\n(?:[^.].*\n)*?.*EIATTR_MAX_THREADS\n.*\n\tValue:\s+(0x\w+)", elf, re.M)
        )
        resources = dict(re.findall(r"Function (\S+):\n\s*(.*)", usage))
        functions = {name: code for name, code in split_functions(sass).items() if re.search(KERNELS, name)}
        names = demangle(list(functions))
        for name, code in functions.items():
            if not re.search(PIPES["tensor"], code):
                continue  # an empty kernel, for another architecture
            instructions = parse(code)
            found = find_loops(instructions, PIPES["tensor"])
            parts = [split_rare(loop) for loop in (found[:2] if "wide" in name else found[:1])]
            body = [i for every, _ in parts for i in every]
            counts = Counter(i.pipe for i in body)
            used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", resources[name])}
            record = {
                "registers": used["REG"],
                "stack": used["STACK"] + used["LOCAL"],
                "threads": int(threads[name], 16),
                "instructions": len(body),
                **{pipe: counts[pipe] for pipe in (*PIPES, "other")},
                "rare": sum(len(rare) for _, rare in parts),
            }
            target = architecture or re.search(r"code for (sm_\w+)", sass)[1]
            kernels.setdefault(target, {})[names[name]] = record
            if target == "sm_90a":
                loops[names[name]] = (
                    parts[0][0],
                    parts[1][0] if parts[1:] else split_rare(find_loops(instructions, "STS")[0])[0],
                )
    return kernels, loops, versions


def demangle(names: list[str]) -> dict[str, str]:
    """Without return type, parameters and namespaces."""
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = [re.sub(r"^void |\w+::|\(anonymous namespace\)::", "", line) for line in plain.splitlines()]
    return {name: line[: line.rindex(">(") + 1] for name, line in zip(names, short, strict=True)}


BLOCK_COST_TILES = 3


def choose_splits(row_blocks: int, tiles: int, resident: int) -> int:
    """As in info_nce_launch.cuh."""
    best, best_cost = 1, math.inf
    for waves in range(1, 5):
        most = min(waves * resident // row_blocks, tiles, 65535)
        if most == 0:
            continue
        block_tiles = -(-tiles // most)
        if (cost := waves * (block_tiles + BLOCK_COST_TILES)) < best_cost:
            best, best_cost = -(-tiles // block_tiles), cost
    return best


def tile_cycles(label: str, tile: Tile, c: int, threads: int, loops: Loops) -> dict:
    """Cycles of a multiprocessor for one tile of a block: with the busiest pipe always busy, and at worst."""
    body, other = loops
    wide = "wide" in tile.kernel
    is_hopper = any(i.opcode == "HGMMA" for i in body)
    warps = threads // 32 - (4 if is_hopper else 0)  # one of Hopper's warpgroups is the producer, or has the scores
    roles = [(body, 4), (other, warps)] if wide else [(body, warps)]
    products = sum(i.tensor_fmas * count for loop, count in roles for i in loop) / (tile.rows * tile.keys * c)
    tiles = products / tile.products
    if tiles not in (1, 2):
        raise SystemExit(f"{label}: {products:g} products of [{tile.rows}, {tile.keys}, {c}]: update TILES")
    cycles: Counter[str] = Counter()
    for loop, count in roles:
        cycles.update({pipe: count / 4 * value / tiles for pipe, value in warp_cycles(loop).items()})
    if tile.terms:
        splitting = 4 if is_hopper else warps
        written = splitting * sum(i.shared_bytes for i in other if i.opcode == "STS")
        iterations = tile.keys * c * 2 * tile.terms / written - (not is_hopper)  # one is in the main loop
        for pipe, value in warp_cycles(other).items():
            cycles[pipe] += iterations * splitting / 4 * value
    if is_hopper:  # the copies to shared memory
        cycles["shared"] += tile.keys * c * (4 if tile.terms else 2) / SHARED_BYTES
    bound = max(cycles, key=lambda pipe: cycles[pipe])
    worst = STALLS * cycles[bound]
    if is_hopper and not wide:  # all warpgroups compute their softmax at the same time
        softmax = max(warp_cycles(exposed(body)).values()) / tiles
        worst = max(cycles[bound], cycles["tensor"] + warps / 4 * softmax)
    return {"bound": bound, "low": cycles[bound], "high": worst}


def estimate(n: int, k: int, c: int, queue: str, tile: Tile, record: dict, cycles: dict) -> dict:
    rows, keys = tile.rows, tile.keys
    if "sm90_kernel" in tile.kernel and 2 * n <= rows:  # both warpgroups have the same rows, each has its own keys
        rows, keys = rows // 2, 2 * keys
    allocated = -(-record["registers"] // 8) * 8 * record["threads"]
    row_blocks = -(-n // rows)
    tiles = -(-k // keys)
    splits = choose_splits(row_blocks, tiles, MULTIPROCESSORS * min(2, 65536 // allocated))
    tiles_of_multiprocessor = -(-row_blocks * splits // MULTIPROCESSORS) * -(-tiles // splits)
    hbm = k * c * (2 if queue == "bf16" else 4) / HBM
    rest = FIXED + 2 * splits * (keys // tile.keys) * n * c * 4 / HBM
    low, high = (max(hbm, tiles_of_multiprocessor * cycles[end] / CLOCK) + rest for end in ("low", "high"))
    return {"low": round(low, 1), "us": round((low + high) / 2, 1), "high": round(high, 1)}


def estimates(kernels: dict, loops: dict[str, Loops]) -> dict[str, dict]:
    rows = {}
    for label, tile in TILES.items():
        names = [name for name in loops if re.fullmatch(tile.kernel, name)]
        if len(names) != 1:
            print(f"{label}: {len(names)} kernels match {tile.kernel}; left out", file=sys.stderr)
            continue
        record = kernels["sm_90a"][names[0]]
        for n, k, c, queue, goal in SHAPES:
            if label.startswith(f"{queue}, {c},"):
                cycles = tile_cycles(label, tile, c, record["threads"], loops[names[0]])
                rows[f"{n}, {k}, {c}, {queue}, {label.split(', ')[-1]}"] = {
                    "kernel": names[0],
                    "tile": f"{tile.rows}, {tile.keys}",
                    "bound": cycles["bound"],
                    "cycles": f"{cycles['low']:.0f} to {cycles['high']:.0f}",
                    **estimate(n, k, c, queue, tile, record, cycles),
                    "goal": goal,
                }
    return rows


def section(report: dict) -> str:
    probes = json.loads(MEASURED.read_text())
    times = {case["name"]: case["result"]["us"] for case in probes["records"] if case.get("result", {}).get("us")}
    columns = ("registers", "stack", "instructions", *PIPES, "rare")
    lines = [
        "For one warp and one iteration of the main loop, of one tile or, where P has two buffers, of two; `sm_90a`, "
        f"nvcc {report['nvcc']}:",
        "",
        "| kernel | rows, keys | " + " | ".join(columns) + " |",
        "|---|---|" + "--:|" * len(columns),
    ]
    for name, row in {row["kernel"]: row for row in report["estimates"].values()}.items():
        cells = [f"`{name}`", row["tile"], *(report["kernels"]["sm_90a"][name][column] for column in columns)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        f"Time of loss and gradient on an H200, estimated, and measured at commit {probes['commit']}:",
        "",
        "| N, K, C, queue, kernel | cycles per tile | estimate, µs | range | measured | goal |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for shape, row in report["estimates"].items():
        n, k, c, queue, kernel = shape.split(", ")
        name = f"probe info_nce {n} {k} {c} {PROBED[queue]}, {kernel}"
        measured = f"{times[name]:.0f}" if name in times else ""
        cells = [f"{row['cycles']} ({row['bound']})", f"{row['us']:.0f}", f"{row['low']:.0f} to {row['high']:.0f}"]
        lines.append("| " + " | ".join([shape, *cells, measured, str(row["goal"])]) + " |")
    return "\n".join(lines)


def to_json(report: dict) -> str:
    """With a line per kernel, for readable diffs."""
    text = json.dumps(report, indent=1)
    return re.sub(r"\{[^{}]*\}", lambda match: re.sub(r"\n\s+", " ", match[0]), text) + "\n"


def differences(committed: dict, report: dict) -> list[str]:
    if committed["nvcc"] != report["nvcc"]:
        return [f"compiled by nvcc {report['nvcc']}, but the counts are for {committed['nvcc']}"]
    problems = []
    for architecture in sorted(committed["kernels"].keys() | report["kernels"].keys()):
        old, new = (side["kernels"].get(architecture, {}) for side in (committed, report))
        for name in sorted(old.keys() | new.keys()):
            before, after = old.get(name, {}), new.get(name, {})
            if changes := [
                f"{key} {before.get(key)} -> {after.get(key)}"
                for key in before | after
                if before.get(key) != after.get(key)
            ]:
                problems.append(f"{architecture} {name}: {', '.join(changes)}")
    if not problems and committed["estimates"] != report["estimates"]:
        problems.append("the estimates differ")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=[str(ROOT / "moco_ext" / "lib" / "libmoco_ext_cuda.so")])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    kernels: dict[str, dict] = {}
    loops: dict[str, Loops] = {}
    versions: set[str] = set()
    for path in arguments.files:
        found, bodies, version = read_kernels(path)
        for architecture, records in found.items():
            kernels.setdefault(architecture, {}).update(records)
        loops |= bodies
        versions |= version
    report = {
        "nvcc": ", ".join(sorted(versions)),
        "kernels": {architecture: dict(sorted(records.items())) for architecture, records in sorted(kernels.items())},
        "estimates": estimates(kernels, loops),
    }
    tables = section(report)
    text = PAGE.read_text()
    page = re.sub(
        r"(<!-- sass:start -->\n).*?(<!-- sass:end -->)", lambda m: f"{m[1]}{tables}\n{m[2]}", text, flags=re.S
    )
    if arguments.write:
        RESULTS.write_text(to_json(report))
        PAGE.write_text(page)
        return 0
    if not arguments.check:
        print(tables)
        return 0
    problems = differences(json.loads(RESULTS.read_text()), report)
    if page != text:
        problems.append(f"{PAGE.name} is out of date")
    if problems:
        problems.append(f"after a change of kernels: python tools/estimate.py {arguments.files[0]} --write")
    print(*(problems or [f"instructions as in {RESULTS.name}"]), sep="\n")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
