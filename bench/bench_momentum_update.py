"""The momentum update over ResNet-50's parameters: the published loop, _foreach, ours on lists and flat."""

import official
import torch
from conftest import Row

import moco_ext

M = 0.999


def resnet50_shapes(dim: int = 128) -> list[tuple[int, ...]]:
    """Shapes of the parameters of a ResNet-50 with a dim-wide last layer, in their order."""

    def conv_and_norm(out, into, side):
        return [(out, into, side, side), (out,), (out,)]

    shapes, into = conv_and_norm(64, 3, 7), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += conv_and_norm(width, into, 1) + conv_and_norm(width, width, 3)
            shapes += conv_and_norm(4 * width, width, 1)
            if block == 0:  # the shortcut changes width
                shapes += conv_and_norm(4 * width, into, 1)
            into = 4 * width
    return [*shapes, (dim, into), (dim,)]


def bench_momentum_update(compare, device):
    shapes = resnet50_shapes()
    count = sum(torch.Size(s).numel() for s in shapes)
    assert (len(shapes), count) == (161, 23_770_304)
    start = torch.randn(count, device=device)
    flat_query = torch.randn(count, device=device)
    queries = [x.clone() for x in split(flat_query, shapes)]

    def row(name, make, update):
        """`make` gives the keys from the start values; `update` moves them once."""
        keys = make(start)

        def first_step():
            fresh = make(start)
            update(fresh)
            return torch.cat([x.flatten() for x in fresh])

        # read both, write one
        return Row(name, lambda: update(keys), flops=3 * count, bytes=12 * count, value=first_step, tolerance=1e-6)

    def separate(flat):
        return [x.clone() for x in split(flat, shapes)]

    def flat(flat):
        return [flat.clone()]

    source, target = torch.randn(count, device=device), torch.empty(count, device=device)
    rows = [
        row("ours, flat", flat, lambda k: moco_ext.momentum_update_(k, [flat_query], M)),
        row("ours, list", separate, lambda k: moco_ext.momentum_update_(k, queries, M)),
        row("official loop", separate, lambda k: official.momentum_update(k, queries, M)),
        row("torch._foreach_lerp_", separate, lambda k: torch._foreach_lerp_(k, queries, 1 - M)),
        row("lerp_, flat", flat, lambda k: k[0].lerp_(flat_query, 1 - M)),
        Row("limit: copy", lambda: target.copy_(source), bytes=2 * source.nbytes),
    ]
    want = M * start.double() + (1 - M) * flat_query.double()
    compare("momentum_update ResNet-50", rows, want)


def split(flat: torch.Tensor, shapes) -> list[torch.Tensor]:
    sizes = [torch.Size(s).numel() for s in shapes]
    return [part.view(s) for part, s in zip(flat.split(sizes), shapes, strict=True)]
