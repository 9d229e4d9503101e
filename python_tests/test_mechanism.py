"""The interface that the three mechanisms share."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from moco_ext import EndToEnd, MemoryBank, MoCo
from moco_ext.mechanism import Mechanism
from moco_ext.shuffle_bn import shared_permutation

IMAGES, N = 40, 8


def encoder(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(27, 16), nn.ReLU(), nn.Linear(16, num_classes))


def models(**options) -> dict[str, Mechanism]:
    torch.manual_seed(0)
    return {
        "queue": MoCo(encoder, 4, 32, **options),
        "queue with ids": MoCo(encoder, 4, 32, same_id="mask", **options),
        "end-to-end": EndToEnd(encoder, 4, **options),
        "memory bank": MemoryBank(encoder, IMAGES, 4, 32, **options),
    }


@pytest.mark.parametrize("name", models())
def test_a_loop_that_knows_no_mechanism_trains_each(name):
    model = models()[name]
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.1)
    seen = []
    model.query_hook = lambda queries: seen.append(queries.shape)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(2):
        index = torch.randperm(IMAGES)[:N]
        images = [torch.randn(N, 3, 3, 3) for _ in range(2)]
        loss, stats, arguments = model.forward_batch(*images, index=index)
        assert (loss.shape, stats.rank.shape) == ((), (N,))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert model.updates == step
        model.update(*arguments)
    assert (model.updates, seen) == (2, [(N, 4)] * 2)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    stored = {"queue": "queue", "queue with ids": "queue", "memory bank": "bank"}.get(name, "encoder_k.1.weight")
    assert {"encoder_q.1.weight", stored} <= changed
    assert (model.key_queue() is None) == ("queue" not in name)
    assert (model.chance_loss is None) == (name == "end-to-end")


class GeneratorsOfTheirDevice(TorchFunctionMode):
    """As on CUDA, which refuses a CPU's generator; the meta device ignores it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get("generator") is not None and torch.device(kwargs.get("device", "cpu")).type != "cpu":
            raise RuntimeError(f"Expected a '{kwargs['device']}' device type for generator but found 'cpu'")
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", models())
def test_models_are_made_and_shuffled_under_another_default_device(name):
    with GeneratorsOfTheirDevice(), torch.device("meta"):
        model = models()[name]
        assert shared_permutation(4, 0).is_cpu
    assert all(x.is_meta for x in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("name", models())
def test_a_forgotten_update_is_warned_of_once(name):
    model = models()[name]
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.1)

    def train(steps: int, accumulate: int, update: bool) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(steps):
                for _ in range(accumulate):
                    loss, _, arguments = model.forward_batch(*torch.randn(2, N, 3, 3, 3), index=torch.arange(N))
                    loss.backward()
                optimizer.step()
                if update:
                    model.update(*arguments)
        return [str(warning.message) for warning in caught]

    assert train(steps=2, accumulate=6, update=True) == []
    (message,) = train(steps=8, accumulate=1, update=False)
    assert "3 optimizer steps without a call of update" in message


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (TypeError, r"T: expected a number, got '0.07'", lambda: MoCo(encoder, 4, 32, T="0.07")),
        (ValueError, r"T: expected a positive, finite temperature, got 0", lambda: MoCo(encoder, 4, 32, T=0)),
        (TypeError, r"K: expected an integer, got 128.0", lambda: MoCo(encoder, 4, 128.0)),
        (ValueError, r"K: expected at least 1, got 0", lambda: MoCo(encoder, 4, 0)),
        (TypeError, r"dim: expected an integer, got True", lambda: MoCo(encoder, True)),
        (TypeError, r"m: expected a number, got '1'", lambda: MoCo(encoder, 4, 32, m="1")),
        (ValueError, r"m: expected a momentum in \[0, 1\], got 7", lambda: MoCo(encoder, 4, 32, m=7)),
        (TypeError, r"images: expected an integer, got None", lambda: MemoryBank(encoder, None)),
        (TypeError, r"base_encoder: .* got an instance of Sequential", lambda: MoCo(encoder(4), 4, 32)),
    ],
)
def test_arguments_of_the_constructors(error, message, make):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("name", models())
def test_arguments_of_a_step(name):
    model = models()[name]
    images, index = torch.randn(N, 3, 3, 3), torch.arange(N)
    with pytest.raises(ValueError, match=r"im_q: expected floating-point images, normalized, got torch\.uint8"):
        model.forward_batch(images.to(torch.uint8), images, index=index)
    if name != "memory bank":
        with pytest.raises(ValueError, match=r"im_k: expected floating-point images"):
            model.forward_batch(images, images.to(torch.uint8), index=index)
    *_, arguments = model.forward_batch(images, images, index=index)
    with pytest.raises(TypeError, match=r"keys: expected the output's keys, out\.keys, got InfoNCEStats"):
        model.update(model.forward_batch(images, images, index=index)[1], *arguments[1:])
    assert model.updates == 0


def test_chance_loss_is_that_of_random_features():
    model = models()["queue"]
    query = F.normalize(torch.randn(4000, 4), dim=1)
    logits = query @ F.normalize(torch.randn(33, 4), dim=1).T * 1e-3
    assert F.cross_entropy(logits, torch.zeros(4000, dtype=torch.long)).item() == pytest.approx(
        model.chance_loss, abs=1e-3
    )


@pytest.mark.slow
def test_type_checkers_know_the_outputs(tmp_path):
    pytest.importorskip("mypy")
    file = tmp_path / "use.py"
    file.write_text(
        "import torch\nfrom moco_ext import EndToEnd, MemoryBank, MoCo\nx = torch.zeros(2, 3, 8, 8)\n"
        "reveal_type(MoCo('resnet18')(x, x))\nreveal_type(EndToEnd('resnet18')(x, x))\n"
        "reveal_type(MemoryBank('resnet18', 9)(x, x))\n"
    )
    command = [sys.executable, "-m", "mypy", "--follow-imports", "silent", "--ignore-missing-imports", str(file)]
    said = subprocess.run(command, capture_output=True, text=True).stdout
    for output in ("MoCoOutput", "MoCoOutput", "MemoryBankOutput"):
        assert output in said
        said = said.replace(output, "", 1)
