"""Estimates communication per step from 1 to 1,024 GPUs: shuffling BN and the queue, whole or divided.

    python bench/scaling.py    # writes the plots and the table of docs/distributed.md

The time of the loss is a fit to measurements on one H200 (bench/results/gpu-1.json). The network is assumed, not
measured: see NETWORK. The results are the time that a step waits if no communication overlaps with the encoders.
"""

import json
import re
import sys
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
PAGE, PLOTS = ROOT / "docs/distributed.md", ROOT / "docs/distributed"
sys.path.insert(0, str(ROOT))
from moco_ext.sharded_queue import exchanged_bytes  # noqa: E402

NODE = 8  # GPUs
NETWORK = {"NVLink": 450e9 * 0.8, "InfiniBand": 50e9 * 0.8}  # bytes/s that a GPU receives, at 80 % of the nominal rate
LATENCY, PER_DOUBLING = 10e-6, 5e-6  # seconds of a collective in a node, and for each doubling of the nodes
IMAGES, IMAGE, DIM = 32, 3 * 224 * 224 * 4, 128  # per GPU; bytes; features
WORLDS = [2**i for i in range(11)]
KEYS = {"65,536": 65_536, "1 M": 10**6, "100 M": 10**8}
COLORS = ("#2f6fdb", "#d9772b", "#4c9a6a", "#c8427f")


def measured() -> tuple[float, float, float]:
    """Of the loss: seconds that do not depend on K, FLOP/s, and bytes/s that a copy reads and writes."""
    records = json.loads((ROOT / "bench/results/gpu-1.json").read_text())["records"]
    of = {record["name"]: record["result"] for record in records if "result" in record}
    small, large, copy = (
        of[name] for name in ("probe info_nce 256 65536 128 bfloat16, Hopper",
                              "probe info_nce 256 1048576 128 bfloat16, Hopper", "probe copy, portable")
    )  # fmt: skip
    rate = (large["flop"] - small["flop"]) / (large["us"] - small["us"]) * 1e6
    return small["us"] * 1e-6 - small["flop"] / rate, rate, copy["bytes"] / copy["us"] * 1e6


def loss_seconds(queries: int, keys: float) -> float:
    """InfoNCE with its gradient against a bfloat16 queue: bound by the products, or by reading the keys."""
    fixed, rate, bandwidth = measured()
    rows = -(-queries // 64) * 64  # of a tile
    return fixed + max(4 * rows * keys * DIM / rate, 2 * keys * DIM / bandwidth)


def collective(received: float, world: int) -> float:
    """Seconds in which each GPU receives so many bytes, evenly from all others."""
    if world == 1:
        return 0.0
    nodes = max(1, world // NODE)
    outside = received * max(0, world - NODE) / (world - 1)
    transfer = (received - outside) / NETWORK["NVLink"] + outside / NETWORK["InfiniBand"]
    return LATENCY + PER_DOUBLING * (nodes.bit_length() - 1) + transfer


def shuffle_seconds(mode: str, world: int) -> float:
    """Shuffling BN's exchange of images."""
    batch = IMAGES * IMAGE
    others = (world - 1) / world
    return {"gather": collective((world - 1) * batch, world), "all_to_all": collective(others * batch, world)}.get(
        mode, 0
    )


def key_seconds(world: int) -> float:
    return collective((world - 1) * IMAGES * DIM * 4, world)


def queue_seconds(keys: int, world: int, sharded: bool) -> float:
    """The loss, with the gather of queries and the exchange of results of a divided queue."""
    if not sharded or world == 1:
        return loss_seconds(IMAGES, keys)
    queries = (world - 1) * IMAGES * DIM * 4
    results = exchanged_bytes(world, IMAGES, DIM) - queries
    return collective(queries, world) + loss_seconds(world * IMAGES, keys / world) + collective(results, world)


def table() -> str:
    lines = ["| keys | GPUs | whole: GB per GPU | ms | divided: GB per GPU | ms |", "|---|--:|--:|--:|--:|--:|"]
    for label, keys in KEYS.items():
        for world in (8, 64, 1024):
            size = 2 * keys * DIM / 1e9
            times = [1e3 * queue_seconds(keys, world, sharded) for sharded in (False, True)]
            lines.append(f"| {label} | {world:,} | {size:.3g} | {times[0]:.2g} | {size / world:.2g} | {times[1]:.2g} |")
    return "\n".join(lines)


def draw() -> None:
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "scaling", "axes.spines.top": False, "font.size": 9}):
        figure = Figure(figsize=(8.4, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        for mode, color in zip(("gather", "all_to_all"), COLORS, strict=False):
            left.plot(WORLDS[1:], [1e3 * shuffle_seconds(mode, w) for w in WORLDS[1:]], label=mode, color=color)
        left.plot(WORLDS[1:], [1e3 * key_seconds(w) for w in WORLDS[1:]], label="keys (all modes)", color=COLORS[2])
        left.set(title="exchange of images and keys", ylabel="ms per step (estimate)")
        for (label, keys), color in zip(KEYS.items(), COLORS, strict=False):
            for sharded, style in ((False, "--"), (True, "-")):
                times = [1e3 * queue_seconds(keys, w, sharded) for w in WORLDS]
                right.plot(
                    WORLDS, times, style, color=color, label=f"{label} keys, {'divided' if sharded else 'whole'}"
                )
        right.set(title="loss against the queue")
        for plot in (left, right):
            plot.set(xscale="log", yscale="log", xlabel="GPUs")
            plot.set_xticks([1, 8, 64, 1024], ["1", "8", "64", "1,024"])
            plot.minorticks_off()
            plot.spines["right"].set_visible(False)
            plot.legend(frameon=False, fontsize=7)
        PLOTS.mkdir(exist_ok=True)
        figure.savefig(PLOTS / "step-time.svg", metadata={"Date": None})


def main() -> None:
    text = PAGE.read_text()
    filled, found = re.subn(
        r"(<!-- scaling:start -->\n).*?(<!-- scaling:end -->)",
        lambda m: f"{m[1]}{table()}\n{m[2]}",
        text,
        flags=re.DOTALL,
    )
    if not found:
        sys.exit(f"expected <!-- scaling:start --> and <!-- scaling:end --> in {PAGE}, got neither")
    PAGE.write_text(filled)
    draw()


if __name__ == "__main__":
    main()
