"""The momentum update of an encoder: ours on lists and on flat buffers, the published loop, _foreach, and timm."""

import official
import pytest
import torch
from conftest import Row
from torch import nn

import moco_ext

M = 0.999
DIM = 128


class Parameters(nn.Module):
    """Parameters of the shapes of an encoder, without its layers."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self.all = nn.ParameterList(nn.Parameter(x, requires_grad=False) for x in tensors)


def shapes_of(encoder: str) -> list[torch.Size]:
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        return [p.shape for p in getattr(torchvision.models, encoder)(num_classes=DIM).parameters()]


def split(flat: torch.Tensor, shapes) -> list[torch.Tensor]:
    parts = flat.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


class Encoders:
    """Keys that start anew for each row, and the queries they move towards."""

    def __init__(self, encoder: str, device: torch.device) -> None:
        self.shapes = shapes_of(encoder)
        self.count = sum(shape.numel() for shape in self.shapes)
        self.start = torch.randn(self.count).to(device)
        self.flat_query = torch.randn(self.count).to(device)
        self.queries = self.split(self.flat_query)
        self.want = M * self.start.double() + (1 - M) * self.flat_query.double()
        self.captured: list[torch.Tensor] = []

    def split(self, flat: torch.Tensor) -> list[torch.Tensor]:
        return [x.clone() for x in split(flat, self.shapes)]

    def official(self, keys: list[torch.Tensor]) -> None:
        """The published loop. It gives `.data` new storage, but a CUDA graph goes on reading that of its capture."""
        if self.flat_query.is_cuda and torch.cuda.is_current_stream_capturing():
            self.captured += [key.detach() for key in keys]
        official.momentum_update(keys, self.queries, M)

    def row(self, name, make, update, bytes_each=12, read=list, tolerance=1e-6) -> Row:
        """`make` gives the state from the start values; `update` moves it once; `read` says what it holds then."""
        state = make(self.start)

        def first_step():
            fresh = make(self.start)
            update(fresh)
            return torch.cat([x.flatten() for x in read(fresh)])

        # read both, write one
        work = {"flops": 3 * self.count, "bytes": bytes_each * self.count}
        return Row(name, lambda: update(state), value=first_step, tolerance=tolerance, **work)


@pytest.mark.parametrize("encoder", ["resnet18", "resnet50", "vit_b_16"])
def bench_momentum_update(compare, device, encoder):
    e = Encoders(encoder, device)
    source, target = torch.randn(e.count).to(device), torch.empty(e.count, device=device)
    rows = [
        e.row("ours, flat", lambda x: [x.clone()], lambda k: moco_ext.momentum_update_(k, [e.flat_query], M)),
        e.row("ours, list", e.split, lambda k: moco_ext.momentum_update_(k, e.queries, M)),
        e.row("official loop", e.split, e.official),
        e.row("torch._foreach_lerp_", e.split, lambda k: torch._foreach_lerp_(k, e.queries, 1 - M)),
        e.row("lerp_, flat", lambda x: [x.clone()], lambda k: k[0].lerp_(e.flat_query, 1 - M)),
    ]
    skipped = {}
    try:
        from timm.utils import ModelEmaV3

        query_model = Parameters(e.queries)
        rows.append(
            e.row(
                "timm ModelEmaV3",
                lambda x: ModelEmaV3(Parameters(e.split(x)), decay=M),
                lambda ema: ema.update(query_model),
                read=lambda ema: list(ema.module.parameters()),
            )
        )
    except ImportError:
        skipped["timm ModelEmaV3"] = "pip install timm"
    rows.append(Row("limit: copy", lambda: target.copy_(source), bytes=2 * source.nbytes))
    compare(f"momentum_update {encoder}", rows, e.want, skipped)


def bench_momentum_update_with_shadow(compare, device):
    """float32 master parameters, and a bfloat16 copy of them for the encoder to run with."""
    e = Encoders("resnet50", device)
    source, target = torch.randn(e.count).to(device), torch.empty(e.count, device=device)

    def masters(x):
        return [x.clone()], [x.to(torch.bfloat16)]

    def lists(x):
        return e.split(x), [p.to(torch.bfloat16) for p in e.split(x)]

    def ours(state):
        moco_ext.momentum_update_(state[0], [e.flat_query], M, low_precision=state[1])

    def ours_then_cast(state):
        moco_ext.momentum_update_(state[0], [e.flat_query], M)
        state[1][0].copy_(state[0][0])

    def foreach(state):
        torch._foreach_lerp_(state[0], e.queries, 1 - M)
        torch._foreach_copy_(state[1], state[0])

    # a master's last bit may send its shadow to the other neighbor in bfloat16, in few of the elements
    options = {"bytes_each": 14, "read": lambda state: state[0] + state[1], "tolerance": 1e-4}
    rows = [
        e.row("ours, flat", masters, ours, **options),
        e.row("ours, flat, then a cast", masters, ours_then_cast, **options),
        e.row("torch._foreach_lerp_, _foreach_copy_", lists, foreach, **options),
        Row("limit: copy", lambda: target.copy_(source), bytes=2 * source.nbytes),
    ]
    compare("momentum_update resnet50 with bfloat16 shadow", rows, torch.cat([e.want, e.want.bfloat16().double()]))
