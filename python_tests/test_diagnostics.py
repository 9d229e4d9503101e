"""Diagnostics metrics against their formulas in float64, and against training without them."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from moco_ext import MoCo
from moco_ext.train.diagnostics import Diagnostics

pytestmark = pytest.mark.usefixtures("one_thread")


class Encoder(nn.Sequential):
    """With all that an extra forward pass could disturb: running statistics and a random number per unit."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(48, 32), nn.BatchNorm1d(32), nn.Dropout(0.2), nn.ReLU())
        self.append(nn.Linear(32, num_classes))


class Given(nn.Module):
    """An encoder whose output is its input, so that a test may choose the queries."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(num_classes))

    def forward(self, x):
        return x * self.gain


def run(every, steps=7, K=50, n=12, model=None, **options):
    """Train a model for some steps; it, its optimizer and each step's metrics."""
    torch.manual_seed(3)
    model = model or MoCo(Encoder, dim=8, K=K)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.1, momentum=0.9)
    diagnostics, metrics = Diagnostics(model, every=every, **options), []
    for step in range(1, steps + 1):
        images = torch.randn(n, 3, 4, 4)
        diagnostics.before(step)
        out = model(images, images + 0.1 * torch.randn_like(images))
        optimizer.zero_grad()
        out.loss.backward()
        metrics.append(diagnostics.after(step, images))
        optimizer.step()
        model.update(out.keys)
    return model, optimizer, metrics


def observe(model, query, key=None, **options):
    """The metrics of one forward and backward pass of a model of ``Given`` encoders."""
    diagnostics = Diagnostics(model, every=1)
    diagnostics.before(1)
    model(query, query if key is None else key).loss.mul(options.get("grad_scale", 1.0)).backward()
    return diagnostics.after(1, query, **options)


def test_training_is_bit_for_bit_the_same():
    states = []
    for every in (0, 1, 3, 6):
        model, optimizer, _ = run(every, steps=13)
        momenta = [state["momentum_buffer"] for state in optimizer.state.values()]
        states.append([*model.state_dict().values(), *momenta, torch.get_rng_state()])
    for other in states[1:]:
        assert all(torch.equal(a, b) for a, b in zip(states[0], other, strict=True))


def test_modes_are_restored_layer_by_layer():
    model = MoCo(Encoder, dim=8, K=50)
    model.encoder_k[2].eval()
    run(1, model=model, steps=2)
    assert [layer.training for layer in model.encoder_k.children()] == [True, True, False, True, True, True]


def test_due_steps():
    model, _, metrics = run(3)
    assert [bool(f) for f in metrics] == [False, False, True, False, False, True, False]
    assert model.query_hook is None
    assert not any(run(0)[2])


def test_figures_are_their_formulas():
    """Against float64; the metrics are float32 sums, 1e-5 is a hundred of its rounding errors."""
    model = MoCo(Given, dim=16, K=40, T=0.2)
    query, key = torch.randn(10, 16) + 1, torch.randn(10, 16)
    metrics = observe(model, query, key)

    q = query.double().requires_grad_()
    unit = normalize(q, dim=1)
    positive = (unit * normalize(key.double(), dim=1)).sum(1, keepdim=True)
    negatives = unit @ model.queue.double().T
    loss = nn.functional.cross_entropy(torch.cat([positive, negatives], 1) / 0.2, torch.zeros(10, dtype=torch.long))
    (grad,) = torch.autograd.grad(loss, q)
    unit = unit.detach()
    p = torch.softmax(negatives.detach() / 0.2, 1)
    sigma = torch.linalg.svdvals(unit)
    sigma = sigma / sigma.sum()
    expected = {
        "query_norm": query.norm(dim=1).mean(),
        "query_grad_norm": 10 * grad.norm(dim=1).mean(),
        "feature_std": 4 * unit.var(0, correction=0).sqrt().mean(),
        "effective_rank": (-(sigma * sigma.log()).sum()).exp(),
        "effective_negatives": (-(p * p.log()).sum(1)).exp().mean(),
    }
    assert metrics == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-5)


def test_gradients_are_of_the_unscaled_loss():
    model, query, key = MoCo(Given, dim=16, K=40), torch.randn(10, 16), torch.randn(10, 16)
    plain = observe(model, query, key)["query_grad_norm"]
    for scale in (1024.0, torch.tensor(1024.0)):  # a power of two changes no digit
        assert observe(model, query, key, grad_scale=scale)["query_grad_norm"] == plain


def test_evenly_spread_queries():
    """The 2 dim axes: the most even set there is."""
    metrics = observe(MoCo(Given, dim=8, K=64), torch.cat([torch.eye(8), -torch.eye(8)]) * 5)
    # each dimension of the unit rows has mean 0 and mean square 2 / 16
    assert metrics["feature_std"] == pytest.approx(1, abs=1e-6)
    assert metrics["effective_rank"] == pytest.approx(8, abs=1e-5)
    assert metrics["query_norm"] == pytest.approx(5, abs=1e-5)


def test_effective_negatives_from_one_to_all():
    model = MoCo(Given, dim=4, K=30, T=0.01)
    query = torch.tensor([[1.0, 0, 0, 0], [1.0, 0, 0, 0]])
    model.queue.copy_(torch.tensor([0.0, 1, 0, 0]).expand(30, 4))
    with pytest.warns(UserWarning, match="collapsing"):  # two equal queries
        assert observe(model, query)["effective_negatives"] == pytest.approx(30, rel=1e-5)
    model.queue[7] = query[0]  # e^100 times the weight of any other
    with pytest.warns(UserWarning, match="collapsing"):
        assert observe(model, query)["effective_negatives"] == pytest.approx(1, abs=1e-5)


def test_a_collapse_is_warned_of_once():
    model = MoCo(Given, dim=8, K=64)
    query = torch.randn(1, 8) + 1e-3 * torch.randn(16, 8)
    diagnostics = Diagnostics(model, every=1)

    def observe_again(step):
        diagnostics.before(step)
        model(query, query).loss.backward()
        return diagnostics.after(step, query)

    with pytest.warns(UserWarning, match="features are collapsing: at step 1 the spread of the queries is 0.00"):
        observe_again(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = observe_again(2)
    assert metrics["feature_std"] < 0.01
    assert 1 <= metrics["effective_rank"] < 1.1


def test_a_healthy_start_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(1, steps=3)


def test_key_drift_is_that_of_keys_still_in_the_queue():
    """K = 50 and 12 keys a step: a key of 4 steps ago is in the queue, at least in part, one of 5 is not."""
    _, _, metrics = run(1, steps=8)
    assert "key_drift" not in metrics[0]
    assert [f["key_age"] for f in metrics[1:]] == [1, 2, 3, 4, 4, 4, 4]
    _, _, sparse = run(3, steps=9)
    assert [f.get("key_age") for f in sparse[2::3]] == [None, 3, 3]
    _, _, sparser = run(6, steps=18)  # due more rarely than a key lives: probed once more in between
    assert [f.get("key_age") for f in sparser[5::6]] == [None, 4, 4]
    _, _, short = run(2, steps=6, K=11)  # no key outlives its step
    assert [f.get("key_age") for f in short[1::2]] == [None, None, None]


def test_key_drift_is_one_minus_cosine_of_the_probed_images():
    model = MoCo(Encoder, dim=8, K=50)
    diagnostics = Diagnostics(model, every=1, probe=5)
    images = torch.randn(12, 3, 4, 4)
    keys = []
    for step in (1, 2):
        diagnostics.before(step)
        model(images, images).loss.backward()
        model.encoder_k.eval()
        keys.append(normalize(model.encoder_k(images[:5]).detach().double(), dim=1))
        model.encoder_k.train()
        metrics = diagnostics.after(step, images if step == 1 else torch.randn_like(images))
        with torch.no_grad():
            for parameter in model.encoder_k.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    # of the order of 1e-2 and a difference of float32 cosines: rounding of 1e-7
    assert metrics["key_drift"] == pytest.approx(float((1 - (keys[0] * keys[1]).sum(1)).mean()), abs=1e-6)
    assert metrics["key_drift"] > 1e-3


def test_a_key_encoder_that_stands_still_drifts_nowhere():
    torch.manual_seed(0)
    model = MoCo(Encoder, dim=8, K=50, m=1.0)
    model.encoder_k[2].momentum = 0.0  # BatchNorm's running statistics stand still too
    _, _, metrics = run(1, steps=3, model=model)
    assert metrics[-1]["key_drift"] == pytest.approx(0, abs=1e-6)


def test_several_forward_passes_a_step():
    """Two halves of a batch, accumulated: metrics of the first, and a queue that lives as many steps as it does."""
    model = MoCo(Encoder, dim=8, K=48)
    diagnostics, ages = Diagnostics(model, every=1), []
    for step in range(1, 6):
        diagnostics.before(step)
        for _ in range(2):
            images = torch.randn(12, 3, 4, 4)
            (model(images, images).loss / 2).backward()
        ages.append(diagnostics.after(step, images, grad_scale=0.5).get("key_age"))
    assert ages == [None, 1, 2, 2, 2]


def test_models_without_a_queue_have_the_figures_of_queries():
    from moco_ext.end_to_end import EndToEnd
    from moco_ext.memory_bank import MemoryBank

    of_queries = {"query_norm", "query_grad_norm", "feature_std", "effective_rank"}
    images = torch.randn(12, 3, 4, 4)
    for model, target in ((EndToEnd(Encoder, 8), images), (MemoryBank(Encoder, 20, 8, K=10), torch.arange(12))):
        diagnostics = Diagnostics(model, every=1)
        diagnostics.before(1)
        model(images, target).loss.backward()
        metrics = diagnostics.after(1, images)
        assert metrics.keys() == of_queries
        assert all(math.isfinite(value) and value > 0 for value in metrics.values())


def test_a_figure_that_is_not_finite_is_left_out():
    model, query = MoCo(Given, dim=8, K=64), torch.randn(16, 8)
    assert "query_grad_norm" in observe(model, query)
    metrics = observe(model, query, grad_scale=math.inf)  # what an overflow does: inf * 0, so NaN
    assert "query_grad_norm" not in metrics
    assert metrics["query_norm"] > 0


def test_a_step_without_a_forward_pass_is_an_error():
    diagnostics = Diagnostics(MoCo(Given, dim=8, K=8), every=2)
    diagnostics.before(2)
    with pytest.raises(RuntimeError, match=r"query_hook: expected a forward pass .* before\(2\) and after"):
        diagnostics.after(2, torch.randn(4, 8))
    with pytest.raises(ValueError, match="every, probe: expected at least 0 and 1, got -1 and 32"):
        Diagnostics(MoCo(Given, dim=8, K=8), every=-1)
