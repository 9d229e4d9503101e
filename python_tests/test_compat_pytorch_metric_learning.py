"""compat.pytorch_metric_learning compared with that package, if it is installed, and with its formulas."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import leave_group
from torch import nn

from moco_ext import l2_normalize
from moco_ext.compat import pytorch_metric_learning as ours

DIM, N, K = 8, 6, 16
LOSSES = ["NTXentLoss", "SupConLoss"]


def peer():
    return pytest.importorskip("pytorch_metric_learning.losses")


def features(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels_of(seed, n, classes):
    """Some of them negative, which are ids like any other."""
    return torch.randint(-2, classes - 2, (n,), generator=torch.Generator().manual_seed(seed))


def formula(kind, query, ids, keys, key_ids, temperature, own=None):
    """The loss by its definition, in float64, for unit keys; own [N]: the key that is the query itself."""
    scores = F.normalize(query.double(), dim=1) @ keys.double().t() / temperature
    losses = []
    for n, row in enumerate(scores):
        others = torch.arange(len(keys)) != (-1 if own is None else own[n])
        positive, negative = (key_ids == ids[n]) & others, key_ids != ids[n]
        if kind == "NTXentLoss":
            losses += [torch.logsumexp(torch.cat([s.view(1), row[negative]]), 0) - s for s in row[positive]]
        elif positive.any():
            losses.append((torch.logsumexp(row[others], 0) - row[positive]).mean())
    if not losses or (ids[:, None] == key_ids).all():
        return (query.double() * 0).sum()
    losses = torch.stack(losses)
    if kind == "SupConLoss":
        losses = losses[losses > 0]
    return losses.mean() if len(losses) else query.double().sum() * 0


def check(loss, query, want, wide, rtol=1e-5):
    """The loss and its gradient, against float64."""
    loss.backward()
    want.backward()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(query.grad.double(), wide.grad, rtol=rtol, atol=rtol)


def same_memory(mine, theirs):
    assert torch.equal(mine.embedding_memory, theirs.embedding_memory)
    assert torch.equal(mine.label_memory, theirs.label_memory)
    assert (mine.queue_idx, mine.has_been_filled) == (theirs.queue_idx, theirs.has_been_filled)
    assert torch.equal(mine.curr_batch_idx, theirs.curr_batch_idx)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("classes", [1, 3, 40])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("memory", [K, N, N + 1])
def test_steps_match_the_peer(kind, classes, masked, memory):
    losses = peer()
    theirs = losses.CrossBatchMemory(getattr(losses, kind)(), DIM, memory)
    mine = ours.CrossBatchMemory(getattr(ours, kind)(), DIM, memory)  # the default temperatures, too
    wrapped = ours.CrossBatchMemory(getattr(losses, kind)(), DIM, memory)  # the peer's loss object
    for step in range(7):  # the memory is filled, and wraps around
        x, labels = features(step, N, DIM), labels_of(step, N, classes)
        mask = features(100 + step, N) > 0 if masked else None
        queries = [x.clone().requires_grad_() for _ in range(3)]
        want = theirs(queries[0], labels, enqueue_mask=mask)
        want.backward()
        for criterion, query in ((mine, queries[1]), (wrapped, queries[2])):
            loss = criterion(query, labels, enqueue_mask=mask)
            loss.backward()
            torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(query.grad, queries[0].grad, rtol=1e-5, atol=1e-6)
            same_memory(criterion, theirs)


@pytest.mark.parametrize("kind", LOSSES)
def test_fifty_steps_of_training_match_the_peer(kind):
    """Queries and keys of two views, as in the peer's MoCo example: new labels for each image, keys enqueued."""

    def train(package):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 16), nn.SiLU(), nn.Linear(16, DIM))
        criterion = package.CrossBatchMemory(getattr(package, kind)(temperature=0.1), DIM, 40)
        optimizer = torch.optim.SGD(model.parameters(), 0.06, momentum=0.9)
        history = []
        for step in range(50):
            images = features(step, N, 10)
            both = torch.cat([model(images), model(images + 0.1 * features(step + 100, N, 10)).detach()])
            labels = torch.arange(N).repeat(2) + N * step
            loss = criterion(both, labels, enqueue_mask=torch.arange(2 * N) >= N)
            history.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return torch.tensor(history)

    mine = train(ours)
    torch.testing.assert_close(mine, train(peer()), rtol=0, atol=5e-5)  # float32 rounding over 50 steps
    assert mine[-1] != mine[0]


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("n", [2, 5, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_memory_matches_the_formula(kind, n, dtype):
    criterion = ours.CrossBatchMemory(getattr(ours, kind)(0.2), DIM, K)
    for step in range(4):
        labels = labels_of(step, n, 4)
        query = (3 * features(step, n, DIM)).to(dtype).requires_grad_()
        wide = query.detach().double().requires_grad_()
        loss = criterion(query, labels)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert criterion.embedding_memory.dtype == dtype
        used = K if criterion.has_been_filled else criterion.queue_idx
        keys = l2_normalize(criterion.embedding_memory[:used])  # in the memory's dtype
        want = formula(kind, wide, labels, keys, criterion.label_memory[:used], 0.2, criterion.curr_batch_idx)
        rtol = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 1e-5)  # the gradient is rounded
        check(loss, query, want, wide, rtol)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_the_peer(kind, dtype):
    """Loosely: the peer computes in the dtype of the embeddings."""
    losses = peer()
    criteria = [p.CrossBatchMemory(getattr(p, kind)(temperature=0.5), DIM, K) for p in (ours, losses)]
    for step in range(4):
        x, labels = features(step, N, DIM).to(dtype), labels_of(step, N, 3).int()
        mine, theirs = (criterion(x, labels) for criterion in criteria)
        torch.testing.assert_close(mine, theirs.float(), rtol=3e-2 if dtype != torch.float32 else 1e-5, atol=1e-5)
        same_memory(*criteria)
        assert criteria[0].label_memory.dtype == torch.int32


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("classes", [1, 3, 40])
@pytest.mark.parametrize("references", [0, 1, 9])
def test_losses_without_a_memory(kind, classes, references):
    loss, theirs = (getattr(package, kind)(0.1) for package in (ours, peer()))
    x, labels = features(1, 7, DIM), labels_of(1, 7, classes)
    ref = (features(2, references, DIM), labels_of(2, references, classes)) if references else (None, None)
    query, other, wide = (x.clone().to(t).requires_grad_() for t in (torch.float32, torch.float32, torch.float64))
    want = theirs(other, labels, None, *ref)
    keys, key_labels = ref if references else (wide, labels)
    keys = F.normalize(keys.double(), dim=1)
    exact = formula(kind, wide, labels, keys, key_labels, 0.1, None if references else range(7))
    check(loss(query, labels, None, *ref), query, exact, wide)
    want.backward()
    torch.testing.assert_close(want.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(query.grad, other.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_peers_self_supervised_loss_takes_ours(kind, symmetric):
    losses = peer()
    wrap = [losses.SelfSupervisedLoss(getattr(p, kind)(0.1), symmetric=symmetric) for p in (ours, losses)]
    views = features(1, N, DIM), features(2, N, DIM)
    torch.testing.assert_close(wrap[0](*views), wrap[1](*views), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("own", [None, 2])
def test_pieces_of_the_positive_pairs(monkeypatch, own):
    """As one piece, with gradients to queries, keys and the temperature."""
    ids, key_ids = labels_of(1, 7, 3) + 2, labels_of(2, 12, 3) + 2
    grads = []
    for elements in (1 << 22, 3 * DIM):
        monkeypatch.setattr(ours, "_PIECE_ELEMENTS", elements)
        query, keys = (F.normalize(features(s, n, DIM), dim=1).requires_grad_() for s, n in ((3, 7), (4, 12)))
        temperature = torch.tensor(0.2, requires_grad=True)
        inputs = [query, temperature, *([keys] if own is not None else [])]
        loss = ours._ntxent(query, ids, keys if own is not None else keys.detach(), key_ids, own, temperature)
        grads.append([loss, *torch.autograd.grad(loss, inputs)])
    for one, pieces in zip(*grads, strict=True):
        torch.testing.assert_close(pieces, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_temperature_with_gradient(kind):
    gradients = []
    for package in (ours, peer()):
        loss = getattr(package, kind)(temperature=nn.Parameter(torch.tensor(0.3)))
        criterion = package.CrossBatchMemory(loss, DIM, K)
        sum(criterion(features(step, N, DIM), labels_of(step, N, 3)) for step in range(3)).backward()
        gradients.append(loss.temperature.grad)
        loss.temperature.data.fill_(0.5)  # read at each call
        gradients.append(criterion(features(4, N, DIM), labels_of(4, N, 3)).detach())
    torch.testing.assert_close(gradients[:2], gradients[2:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", LOSSES)
def test_two_losses_before_backward(kind):
    """The memory may be overwritten in between."""
    criterion = ours.CrossBatchMemory(getattr(ours, kind)(0.2), DIM, K)
    apart = ours.CrossBatchMemory(getattr(ours, kind)(0.2), DIM, K)
    batches = [(features(step, N, DIM).requires_grad_(), labels_of(step, N, 3)) for step in range(4)]
    total = sum(criterion(*batch) for batch in batches)
    together = torch.autograd.grad(total, [x for x, _ in batches])
    for (x, labels), gradient in zip(batches, together, strict=True):
        (want,) = torch.autograd.grad(apart(x, labels), x)
        torch.testing.assert_close(gradient, want)


def test_low_temperature():
    """Exact where the peer's probabilities underflow: its loss ends at -log of the dtype's smallest number."""
    x, labels = torch.eye(4, DIM), torch.tensor([0, 0, 1, 2])
    x[2] = x[1] = -x[0]
    loss = ours.NTXentLoss(0.005)(x, labels)
    torch.testing.assert_close(loss.double(), formula("NTXentLoss", x, labels, x, labels, 0.005, range(4)))
    assert loss > 190
    assert peer().NTXentLoss(0.005)(x, labels) < 90


@pytest.mark.parametrize("kind", LOSSES)
def test_a_batch_of_one_is_not_its_own_positive(kind):
    criterion = ours.CrossBatchMemory(getattr(ours, kind)(0.2), DIM, K)
    labels = torch.zeros(1, dtype=torch.long)
    assert criterion(features(0, 1, DIM), labels) == 0
    criterion(features(1, 1, DIM), labels + 1)
    loss = criterion(features(2, 1, DIM), labels)
    own = criterion.curr_batch_idx
    keys = F.normalize(criterion.embedding_memory[:3], dim=1)
    want = formula(kind, features(2, 1, DIM), labels, keys, torch.tensor([0, 1, 0]), 0.2, own)
    assert want > 0
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
    assert getattr(ours, kind)()(features(0, 1, DIM), labels) == 0  # compared with nothing


@pytest.mark.parametrize("kind", LOSSES)
def test_empty_masks(kind):
    criterion = ours.CrossBatchMemory(getattr(ours, kind)(), DIM, K)
    x, labels = features(0, N, DIM).requires_grad_(), labels_of(0, N, 3)
    loss = criterion(x, labels, enqueue_mask=torch.zeros(N, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert x.grad.abs().max() == 0
    assert (criterion.queue_idx, criterion.has_been_filled) == (0, False)
    assert criterion(x, labels, enqueue_mask=torch.ones(N, dtype=torch.bool)) == 0
    assert criterion.queue_idx == N


def test_labels_of_large_values():
    """Negative ids are unknown to the operators, but labels to the peer."""
    labels = torch.tensor([-1, -1, -(2**63), -(2**63), 2**63 - 2, 2**63 - 2])
    for kind in LOSSES:
        x = features(0, N, DIM)
        want = getattr(ours, kind)(0.2)(x, torch.tensor([0, 0, 1, 1, 2, 2]))
        torch.testing.assert_close(getattr(ours, kind)(0.2)(x, labels), want)


def test_state():
    mine = ours.CrossBatchMemory(ours.NTXentLoss(), DIM, K)
    mine(features(0, N, DIM), labels_of(0, N, 3))
    assert set(mine.state_dict()) == {"embedding_memory", "label_memory"}
    losses = peer()
    theirs = losses.CrossBatchMemory(losses.NTXentLoss(), DIM, K)
    theirs.load_state_dict(mine.state_dict())
    mine.load_state_dict(theirs.state_dict())
    assert torch.equal(mine.embedding_memory[:N], features(0, N, DIM))
    mine.add_to_memory(features(1, K, DIM), labels_of(1, K, 3), K)
    assert mine.has_been_filled
    assert mine.queue_idx == N
    assert torch.equal(mine.embedding_memory, features(1, K, DIM).roll(N, 0))
    mine.reset_queue()
    assert (mine.queue_idx, mine.has_been_filled) == (0, False)
    assert not mine.embedding_memory.any()
    assert not mine.label_memory.any()


def test_nan_is_visible():
    x = features(0, N, DIM)
    x[2] = torch.nan
    for kind in LOSSES:
        assert getattr(ours, kind)()(x, torch.arange(N) % 2).isnan()


def memory(**changes):
    return ours.CrossBatchMemory(**{"loss": ours.NTXentLoss(), "embedding_size": DIM, "memory_size": K, **changes})


def test_losses_that_are_not_supported():
    losses = peer()
    distances = pytest.importorskip("pytorch_metric_learning.distances")
    reducers = pytest.importorskip("pytorch_metric_learning.reducers")
    regularizers = pytest.importorskip("pytorch_metric_learning.regularizers")

    class Changed(losses.NTXentLoss):
        pass

    for loss in (losses.ContrastiveLoss(), nn.CrossEntropyLoss(), Changed()):
        with pytest.raises(TypeError, match="loss: expected NTXentLoss or SupConLoss.* got .*" + type(loss).__name__):
            memory(loss=loss)
    for name, part in {
        "distance": distances.LpDistance(),
        "reducer": reducers.ThresholdReducer(low=0),
        "embedding_regularizer": regularizers.LpRegularizer(),
    }.items():
        with pytest.raises(ValueError, match=rf"loss\.{name}: expected .* got {type(part).__name__}"):
            memory(loss=losses.NTXentLoss(**{name: part}))
    for changes in (
        {"reducer": reducers.MeanReducer()},
        {"reducer": reducers.AvgNonZeroReducer(high=1)},
        {"distance": distances.CosineSimilarity(power=2)},
        {"distance": distances.CosineSimilarity(collect_stats=True)},
    ):
        with pytest.raises(ValueError, match=r"loss\.(reducer|distance): expected"):
            memory(loss=losses.SupConLoss(**changes))
    criterion = memory(loss=losses.SupConLoss())
    criterion.loss.reducer = reducers.MeanReducer()  # afterwards
    with pytest.raises(ValueError, match=r"loss\.reducer: expected AvgNonZeroReducer"):
        criterion(features(0, N, DIM), labels_of(0, N, 3))
    assert criterion.queue_idx == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"miner": nn.Identity()}, "miner: expected None.* got Identity"),
        ({"embedding_size": 0}, "embedding_size: expected at least 1, got 0"),
        ({"memory_size": 0}, "memory_size: expected at least 1, got 0"),
    ],
)
def test_invalid_memories(changes, message):
    with pytest.raises(ValueError, match=message):
        memory(**changes)


@pytest.mark.parametrize("kind", ["NTXentLoss", "SupConLoss"])
@pytest.mark.parametrize(
    ("temperature", "message"),
    [
        (-1.0, "temperature: expected a positive number .* got -1"),
        (torch.tensor(0.0), "temperature: expected a positive number .* got 0"),
        (torch.full((N,), 0.1), r"temperature: expected a number or a tensor of one element, got shape \[6\]"),
        ("0.1", "temperature: expected a number or a 0-dim tensor, got '0.1'"),
    ],
)
def test_a_temperature_that_is_refused_stores_nothing(kind, temperature, message):
    criterion = ours.CrossBatchMemory(getattr(ours, kind)(), DIM, K)
    criterion.loss.temperature = temperature
    with pytest.raises((ValueError, TypeError), match=message):
        criterion(features(0, N, DIM), labels_of(0, N, 3))
    assert criterion.queue_idx == 0
    assert not criterion.embedding_memory.any()


PAIRS = (torch.zeros(1, dtype=torch.long),) * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embeddings": torch.zeros(N, DIM + 1)}, r"embeddings: expected \[N, 8\], got \[6, 9\]"),
        ({"embeddings": torch.zeros(DIM)}, r"embeddings: expected \[N, 8\]"),
        ({"embeddings": torch.ones(N, DIM).int()}, "embeddings: expected float32, .* got torch.int32"),
        ({"labels": None}, "labels: expected integers .* got NoneType"),
        ({"labels": torch.zeros(N)}, "labels: expected integers .* got torch.float32"),
        ({"labels": torch.zeros(N + 1, dtype=torch.long)}, r"labels: expected integers \[6\].* got torch.int64 \[7\]"),
        ({"indices_tuple": PAIRS}, "indices_tuple: expected None"),
        ({"enqueue_mask": torch.zeros(N, dtype=torch.uint8)}, r"enqueue_mask: expected bool \[6\], got torch.uint8"),
        ({"enqueue_mask": torch.zeros(N - 1, dtype=torch.bool)}, r"enqueue_mask: expected bool \[6\]"),
        (
            {"embeddings": torch.zeros(K + 1, DIM), "labels": torch.zeros(K + 1, dtype=torch.long)},
            "embeddings: expected at most memory_size=16 to store, got 17",
        ),
    ],
)
def test_invalid_arguments(arguments, message):
    criterion = memory()
    with pytest.raises(ValueError, match=message):
        criterion(**{"embeddings": features(0, N, DIM), "labels": labels_of(0, N, 3), **arguments})
    assert criterion.queue_idx == 0
    assert not criterion.embedding_memory.any()


def test_invalid_references():
    loss, x, labels = ours.SupConLoss(), features(0, N, DIM), labels_of(0, N, 3)
    with pytest.raises(ValueError, match="indices_tuple: expected None"):
        loss(x, labels, PAIRS)
    with pytest.raises(ValueError, match="ref_emb: expected a tensor together with ref_labels"):
        loss(x, labels, ref_labels=labels)
    with pytest.raises(ValueError, match="ref_labels: expected integers"):
        loss(x, labels, ref_emb=x)
    with pytest.raises(ValueError, match=r"ref_emb: expected \[N, 8\]"):
        loss(x, labels, ref_emb=x[:, 1:], ref_labels=labels)
    with pytest.raises(ValueError, match="ref_emb: expected a tensor without gradient"):
        loss(x, labels, ref_emb=x.clone().requires_grad_(), ref_labels=labels)
    with pytest.raises(ValueError, match="temperature: expected a positive number"):
        ours.SupConLoss(-1.0)(x, labels)


def test_invalid_distributed_losses():
    with pytest.raises(TypeError, match="loss: expected CrossBatchMemory, NTXentLoss or SupConLoss"):
        ours.DistributedLossWrapper(nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="efficient: expected False"):
        ours.DistributedLossWrapper(memory(), efficient=True)
    wrapped, x, labels = ours.DistributedLossWrapper(ours.NTXentLoss()), features(0, N, DIM), labels_of(0, N, 3)
    with pytest.raises(ValueError, match="ref_emb: expected None"):
        wrapped(x, labels, ref_emb=x, ref_labels=labels)
    with pytest.raises(ValueError, match="enqueue_mask: expected None"):
        wrapped(x, labels, enqueue_mask=labels > 0)
    assert torch.equal(wrapped(x, labels), ours.NTXentLoss()(x, labels))  # one process


def run_rank(rank, world, path):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    from pytorch_metric_learning import losses
    from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

    def compare(mine, theirs, mask=None, **options):
        criteria = ours.DistributedLossWrapper(mine, **options), DistributedLossWrapper(theirs, **options)
        for step in range(4):
            labels, results = labels_of(10 * step + rank, N, 4), []
            for criterion in criteria:
                x = features(10 * step + rank, N, DIM).requires_grad_()
                loss = criterion(x, labels, enqueue_mask=mask)
                loss.backward()
                results.append((loss.detach(), x.grad))
            torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
            assert results[0][0] > 0
            if isinstance(mine, ours.CrossBatchMemory):
                same_memory(mine, theirs)

    for kind in LOSSES:
        make, peers = getattr(ours, kind), getattr(losses, kind)
        for mask in (None, torch.arange(N) % 3 > rank):
            compare(ours.CrossBatchMemory(make(0.2), DIM, 30), losses.CrossBatchMemory(peers(0.2), DIM, 30), mask)
        for efficient in (False, True):
            compare(make(0.2), peers(0.2), efficient=efficient)
    leave_group()


def test_two_processes(tmp_path):
    pytest.importorskip("pytorch_metric_learning")
    torch.multiprocessing.spawn(run_rank, (2, tmp_path / "rendezvous"), nprocs=2)
