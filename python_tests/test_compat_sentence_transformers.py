"""compat.sentence_transformers compared with sentence-transformers, and with its formulas in float64."""

import itertools
import os
import runpy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import leave_group
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("sentence_transformers", minversion="6.2")
from sentence_transformers import SentenceTransformer, util
from sentence_transformers.base.modules import InputModule
from sentence_transformers.sentence_transformer import losses as peer
from sentence_transformers.sentence_transformer import modules

from moco_ext.compat import sentence_transformers as ours

DIM = 8
OTHER_DIRECTIONS = ("query_to_query", "doc_to_query", "doc_to_doc")
PARTITIONS = [
    (("query_to_doc", *others), mode)
    for count in range(4)
    for others in itertools.combinations(OTHER_DIRECTIONS, count)
    for mode in ("joint", "per_direction")
    if mode == "joint" or not {"query_to_query", "doc_to_doc"} & set(others)
]
HARDNESS = [(None, 0.0), ("in_batch_negatives", 9.0), ("hard_negatives", 5.0), ("all_negatives", 5.0)]
PLAIN, CACHED = "MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"


class Letters(InputModule):
    """The mean of a text's letter embeddings, with dropout: a model without files."""

    def __init__(self, dim=DIM, dropout=0.0):
        super().__init__()
        self.letters = nn.Embedding(128, 16)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(16, dim)

    def preprocess(self, inputs, prompt=None, **_):
        codes = [torch.tensor([ord(letter) for letter in text]) for text in inputs]
        ids = nn.utils.rnn.pad_sequence(codes, batch_first=True)
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    def forward(self, features, **_):
        mask = features["attention_mask"].unsqueeze(2).to(self.letters.weight)
        mean = (self.letters(features["input_ids"]) * mask).sum(1) / mask.sum(1)
        features["sentence_embedding"] = self.head(torch.tanh(self.dropout(mean)))
        return features

    def get_embedding_dimension(self):
        return self.head.out_features

    def save(self, *_, **__):
        pass


def model_of(dtype=torch.float32, **options):
    torch.manual_seed(0)
    return SentenceTransformer(modules=[Letters(**options)], device="cpu").to(dtype)


def texts(n, columns=3):
    words = [f"{'abcdefghijkl'[i % 12] * (1 + i % 5)} {i}" for i in range(n * columns)]
    return [words[column::columns] for column in range(columns)]


def features(model, columns):
    return [model.preprocess(column) for column in columns]


def embeddings(n, columns=3, dtype=torch.float32, seed=1, dim=DIM):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, dim, generator=generator).to(dtype).requires_grad_() for _ in range(columns)]


def formulation(columns, scale, cosine, directions, partition_mode, hardness_mode, strength, queue=None):
    """The loss from its logits, row by row, in float64; ``queue`` [K, dim] of further documents."""
    unit = (lambda x: F.normalize(x.double(), dim=1)) if cosine else torch.Tensor.double
    queries, *docs = (unit(column) for column in columns)
    losses = []
    for n in range(len(queries)):
        positive = scale * queries[n] @ docs[0][n]
        to_docs = [positive]
        for doc, j in itertools.product(docs, range(len(queries))):
            if doc is not docs[0] or j != n:
                similarity = queries[n] @ doc[j]
                hard = hardness_mode == "all_negatives" or hardness_mode == (
                    "hard_negatives" if j == n else "in_batch_negatives"
                )
                to_docs.append(scale * similarity + (strength * similarity.detach() if hard else 0))
        for key in () if queue is None else queue.double():
            similarity = queries[n] @ key
            hard = hardness_mode in ("all_negatives", "in_batch_negatives")
            to_docs.append(scale * similarity + (strength * similarity.detach() if hard else 0))
        others = [j for j in range(len(queries)) if j != n]
        scores = {
            "query_to_doc": to_docs,
            "query_to_query": [scale * queries[n] @ queries[j] for j in others],
            "doc_to_query": [scale * docs[0][n] @ query for query in queries],
            "doc_to_doc": [scale * docs[0][n] @ doc[j] for doc in docs for j in others],
        }
        scores = [torch.stack(scores[d]) for d in directions if scores[d]]
        if partition_mode == "joint":
            losses.append(torch.cat(scores).logsumexp(0) - positive)
        else:
            losses.append(sum(s.logsumexp(0) for s in scores) / len(scores) - positive)
    return torch.stack(losses).mean()


def gradients(loss, columns):
    return torch.autograd.grad(loss, columns, materialize_grads=True)


@pytest.mark.parametrize(("hardness", "strength"), HARDNESS)
@pytest.mark.parametrize(("directions", "mode"), PARTITIONS, ids=str)
def test_all_options(directions, mode, hardness, strength):
    model = model_of()
    for fct, scale, columns in ((util.cos_sim, 20.0, 2), (util.cos_sim, 20.0, 4), (util.dot_score, 1.0, 3)):
        options = [model, scale, fct, False, directions, mode, hardness, strength]
        xs = embeddings(5, columns)
        wide = [x.detach().double().requires_grad_() for x in xs]
        loss = ours.MultipleNegativesRankingLoss(*options).compute_loss_from_embeddings(xs, None)
        theirs = peer.MultipleNegativesRankingLoss(*options).compute_loss_from_embeddings(wide, None)
        want = formulation(wide, scale, fct is util.cos_sim, directions, mode, hardness, strength)
        torch.testing.assert_close(theirs, want, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(loss.double(), want, rtol=2e-6, atol=2e-6)  # float32, sums of a few logits of 30
        for got, reference in zip(gradients(loss, xs), gradients(want, wide), strict=True):
            torch.testing.assert_close(got.double(), reference, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("hardness", "strength"), HARDNESS)
def test_one_row(hardness, strength):
    """Directions without any candidate but the positive."""
    for columns in (2, 3):
        options = [model_of(), 20.0, util.cos_sim, False, ("query_to_doc", *OTHER_DIRECTIONS), "joint"]
        options += [hardness, strength]
        xs = embeddings(1, columns)
        loss, want = (
            package.MultipleNegativesRankingLoss(*options).compute_loss_from_embeddings(xs, None)
            for package in (ours, peer)
        )
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
        for got, reference in zip(gradients(loss, xs), gradients(want, xs), strict=True):
            torch.testing.assert_close(got, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    """The gradient is rounded to the dtype once; the original sums those of the directions in the dtype."""
    options = [20.0, util.cos_sim, False, ("query_to_doc", *OTHER_DIRECTIONS), "joint"]
    xs = embeddings(7, 3, dtype)
    wide = [x.detach().double().requires_grad_() for x in xs]
    loss, theirs = (
        package.MultipleNegativesRankingLoss(model_of(), *options).compute_loss_from_embeddings(xs, None)
        for package in (ours, peer)
    )
    want = formulation(wide, options[0], True, *options[3:], None, 0.0)
    assert loss.dtype == theirs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-6)
    rounding = max(torch.finfo(dtype).eps, 1e-6)
    for got, reference, exact in zip(*map(gradients, (loss, theirs, want), (xs, xs, wide)), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), exact, rtol=rounding / 2, atol=1e-5)
        torch.testing.assert_close(got, reference, rtol=0, atol=2 * rounding * exact.abs().max().item())


@pytest.mark.parametrize("hardness", ["all_negatives", None])
def test_trainable_scale(hardness):
    grads = []
    for package in (ours, peer):
        loss_of = package.MultipleNegativesRankingLoss(model_of(), hardness_mode=hardness, hardness_strength=5.0)
        loss_of.scale = nn.Parameter(torch.tensor(10.0))
        loss_of.compute_loss_from_embeddings(embeddings(5), None).backward()
        grads.append(loss_of.scale.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def train(package, name, steps=6, dropout=0.3, batch=10, wrapper=None, **options):
    """Losses and final parameters of a few steps, with dropout, on batches of triplets."""
    model = model_of(dropout=dropout).train()
    criterion = getattr(package, name)(model, **options)
    criterion = wrapper(model, criterion) if wrapper else criterion
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    values = []
    for step in range(steps):
        columns = [column[step:] + column[:step] for column in texts(batch)]
        loss = criterion(features(model, columns), None)
        values.append(loss.item())
        optimizer.zero_grad()
        (2 * loss).backward()  # the cached form's hook has to scale, too
        optimizer.step()
    return torch.tensor(values), [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (PLAIN, {}),
        (PLAIN, {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}),
        (CACHED, {"mini_batch_size": 3}),
        (CACHED, {"mini_batch_num_tokens": 20, "hardness_mode": "hard_negatives", "hardness_strength": 5.0}),
        (CACHED, {"mini_batch_size": 100, "directions": ("query_to_doc", *OTHER_DIRECTIONS)}),
    ],
)
def test_training_steps_match(name, options):
    """From the same random state, so that dropout draws the same masks, also in the cached form's second pass."""
    mine, parameters = train(ours, name, **options)
    theirs, reference = train(peer, name, **options)
    assert mine[0] != mine[-1]
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    for got, want in zip(parameters, reference, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", [PLAIN, CACHED])
def test_matryoshka(name):
    def wrapper(model, loss):
        return peer.MatryoshkaLoss(model, loss, [8, 4])

    mine, parameters = train(ours, name, wrapper=wrapper)
    theirs, reference = train(peer, name, wrapper=wrapper)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    for got, want in zip(parameters, reference, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match=r"queue_size: expected 0 or embeddings with 8 features.*got 5 and 4"):
        train(ours, name, wrapper=wrapper, queue_size=5)


def test_all_layers_would_share_a_queue(tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef"]))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    sizes = {"vocab_size": 11, "hidden_size": DIM, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.BertModel(transformers.BertConfig(**sizes, num_hidden_layers=2)).save_pretrained(tmp_path)
    model = SentenceTransformer(modules=[modules.Transformer(str(tmp_path)), modules.Pooling(DIM)], device="cpu")

    def step(**options):
        columns = [["a b", "c d"], ["a c", "d d"]]
        loss = peer.AdaptiveLayerLoss(model, ours.MultipleNegativesRankingLoss(model, **options))
        return loss([model.preprocess(column) for column in columns], None)

    step().backward()
    with pytest.raises(ValueError, match="queue_size: expected 0 within AdaptiveLayerLoss, got 5"):
        step(queue_size=5)


def test_calculate_loss():
    """Its gradient is in the embeddings when it returns, and the graph is gone."""
    loss_of = ours.CachedMultipleNegativesRankingLoss(model_of())
    columns = embeddings(5)
    want = peer.MultipleNegativesRankingLoss(model_of()).compute_loss_from_embeddings(columns, None)
    loss = loss_of.calculate_loss([list(column.split(2)) for column in columns], with_backward=True)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, want.detach(), rtol=1e-6, atol=1e-6)
    for column, reference in zip(columns, gradients(want, columns), strict=True):
        torch.testing.assert_close(column.grad, reference, rtol=1e-4, atol=1e-5)


def test_other_versions(monkeypatch):
    """In which the original would never call our loss."""
    monkeypatch.delattr(peer.MultipleNegativesRankingLoss, "compute_loss_from_embeddings")
    with pytest.raises(ImportError, match=r"expected sentence-transformers 6\.2 .* got .*compute_loss_from_embeddings"):
        runpy.run_path(ours.__file__, run_name="moco_ext.compat.again")


def test_cached_equals_plain():
    """Without dropout; with it, the mini-batches draw other masks."""
    mine, parameters = train(ours, CACHED, dropout=0.0, mini_batch_size=4, queue_size=15)
    plain, reference = train(ours, PLAIN, dropout=0.0, queue_size=15)
    torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-6)
    for got, want in zip(parameters, reference, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("hardness", "strength"), HARDNESS)
@pytest.mark.parametrize("cosine", [True, False])
def test_queue(cosine, hardness, strength):
    """Negatives of the last steps' positives, [7, dim], of batches that do not divide it."""
    fct, scale = (util.cos_sim, 20.0) if cosine else (util.dot_score, 1.0)
    directions = ("query_to_doc", "doc_to_doc")
    loss_of = ours.MultipleNegativesRankingLoss(
        model_of(), scale, fct, False, directions, "joint", hardness, strength, queue_size=7
    )
    earlier = torch.empty(0, DIM)
    for step in range(4):
        xs = embeddings(3, seed=step)
        loss = loss_of.compute_loss_from_embeddings(xs, None)
        want = formulation(xs, scale, cosine, directions, "joint", hardness, strength, earlier)
        torch.testing.assert_close(loss.double(), want, rtol=2e-6, atol=2e-6)
        for got, reference in zip(gradients(loss, xs), gradients(want, xs), strict=True):
            torch.testing.assert_close(got, reference, rtol=1e-4, atol=2e-5)
        positives = xs[1].detach()
        earlier = torch.cat([earlier, F.normalize(positives, dim=1) if cosine else positives])[-7:]
    assert loss_of.queue_size == 7


@pytest.mark.parametrize("name", [PLAIN, CACHED])
def test_the_queue_is_filled_in_training_only(name):
    model = model_of()
    loss_of = getattr(ours, name)(model, queue_size=7)
    queue = loss_of.queue if name == PLAIN else loss_of.loss.queue
    batch = features(model, texts(4, 2))
    with torch.no_grad():
        before = loss_of(batch, None)
        assert torch.equal(loss_of(batch, None), before)
    assert queue.queue_valid.item() == 0
    loss_of(batch, None)
    assert queue.queue_valid.item() == 4
    with torch.no_grad():
        assert loss_of(batch, None) > before
    again = getattr(ours, name)(model_of(), queue_size=7)
    again.load_state_dict(loss_of.state_dict())
    assert torch.equal((again.queue if name == PLAIN else again.loss.queue).queue, queue.queue)


@pytest.mark.parametrize("name", [PLAIN, CACHED])
def test_without_a_queue_all_is_as_in_the_original(name):
    options = {"scale": 10.0, "similarity_fct": util.dot_score, "hardness_mode": "all_negatives"}
    model = model_of()
    mine, theirs = (getattr(package, name)(model, hardness_strength=1.0, **options) for package in (ours, peer))
    assert isinstance(mine, getattr(peer, name))
    assert mine.get_config_dict() == theirs.get_config_dict()
    assert getattr(ours, name)(model, queue_size=9).get_config_dict()["queue_size"] == 9
    assert mine.citation == theirs.citation
    assert mine.temperature == theirs.temperature
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    for loss in (mine, theirs):
        loss.scale, loss.directions, loss.partition_mode = 5.0, ("query_to_doc", "doc_to_query"), "per_direction"
    batch = features(model, texts(4))
    torch.testing.assert_close(mine(batch, None), theirs(batch, None), rtol=1e-5, atol=1e-6)


def test_model_similarity():
    model = model_of()
    xs = embeddings(4)
    for name, fct in (("cosine", util.cos_sim), ("dot", util.dot_score)):
        model.similarity_fn_name = name
        mine = ours.MultipleNegativesRankingLoss(model, 2.0, model.similarity)
        want = peer.MultipleNegativesRankingLoss(model, 2.0, fct)
        torch.testing.assert_close(
            mine.compute_loss_from_embeddings(xs, None), want.compute_loss_from_embeddings(xs, None)
        )
    model.similarity_fn_name = "euclidean"
    with pytest.raises(ValueError, match=r"similarity_fct: expected cos_sim or dot_score.*got euclidean_sim"):
        mine.compute_loss_from_embeddings(xs, None)


@pytest.mark.parametrize("name", [PLAIN, CACHED])
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"similarity_fct": util.euclidean_sim}, ValueError, "similarity_fct: expected .* got euclidean_sim"),
        ({"similarity_fct": lambda a, b: a @ b.t()}, ValueError, "similarity_fct: expected .* got <lambda>"),
        ({"scale": 0.0}, ValueError, "[Ss]cale"),
        ({"directions": ("doc_to_query",)}, ValueError, "query_to_doc"),
        ({"directions": ("query_to_doc", "doc_to_doc"), "partition_mode": "per_direction"}, ValueError, "partition"),
        ({"hardness_mode": "some"}, ValueError, "hardness_mode"),
        ({"queue_size": -1}, ValueError, "K: expected at least 1, got -1"),
        ({"queue_size": 2.5}, TypeError, "K: expected an integer, got 2.5"),
        ({"queue": 5}, TypeError, "queue"),
    ],
)
def test_invalid_arguments(name, options, error, match):
    with pytest.raises(error, match=match):
        getattr(ours, name)(model_of(), **options)


def test_a_queue_needs_a_dimension():
    model = model_of()
    model[0].get_embedding_dimension = lambda: None
    with pytest.raises(ValueError, match=r"queue_size: expected 0 for a model whose .* is None, got 3"):
        ours.MultipleNegativesRankingLoss(model, queue_size=3)


def test_invalid_batches():
    model = model_of()
    for name in (PLAIN, CACHED):
        with pytest.raises(ValueError, match="at least 2"):
            getattr(ours, name)(model)(features(model, texts(3, 1)), None)
    loss = ours.MultipleNegativesRankingLoss(model)
    x, short = torch.randn(4, DIM), torch.randn(3, DIM)
    for columns in ([x, short, x], [x, x, short], [x, torch.randn(4, 5)], [x.view(2, 2, DIM)] * 2):
        with pytest.raises(ValueError, match=r"embeddings: expected columns of one shape \[N, dim\], got"):
            loss.compute_loss_from_embeddings(columns, None)
    loss.hardness_mode, loss.hardness_strength = "some", 1.0
    with pytest.raises(ValueError, match=r"hardness_mode: expected None, .*got 'some'"):
        loss.compute_loss_from_embeddings([x, x], None)


class Largest(TorchDispatchMode):
    """The number of elements of the largest result of an operator."""

    elements = 0

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        results = operator(*arguments, **keywords or {})
        for x in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return results


@pytest.mark.parametrize(("hardness", "strength"), HARDNESS)
def test_no_similarities_are_stored(hardness, strength):
    """Largest are the 2N documents, of N = 256 texts; also with a queue of 512 keys."""
    options = [model_of(), 20.0, util.cos_sim, False, ("query_to_doc", *OTHER_DIRECTIONS), "joint"]
    options += [hardness, strength]
    n = 256
    largest = {}
    for package, queue in ((ours, {"queue_size": 512}), (peer, {})):
        loss_of = package.MultipleNegativesRankingLoss(*options, **queue)
        with Largest() as mode:
            for _ in range(2):
                loss_of.compute_loss_from_embeddings(embeddings(n), None).backward()
        largest[package] = mode.elements
    assert largest[ours] <= 2 * n * DIM
    assert largest[peer] >= n * n  # the mode sees what it should


def test_trainer(tmp_path):
    """SentenceTransformerTrainer with either package's loss: a few steps, an evaluation and the model card."""
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("accelerate")
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    names = ("anchor", "positive", "negative")
    rows = [dict(zip(names, row, strict=True)) for row in zip(*texts(24), strict=True)]
    of_strings = datasets.Features(dict.fromkeys(names, datasets.Value("string")))
    data = datasets.IterableDataset.from_generator(lambda: iter(rows), of_strings)
    for name in (PLAIN, CACHED):
        results, cited = [], []
        for package in (ours, peer):
            model = model_of(dropout=0.2)
            options = {"mini_batch_size": 3} if name == CACHED else {}
            arguments = SentenceTransformerTrainingArguments(
                output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=8, learning_rate=0.05, seed=3,
                logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
                gradient_accumulation_steps=2,
            )  # fmt: skip
            trainer = SentenceTransformerTrainer(
                model, arguments, train_dataset=data, eval_dataset=data, loss=getattr(package, name)(model, **options)
            )
            trainer.train()
            history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            results.append([*history, trainer.evaluate()["eval_loss"]])
            cited.append(model.model_card_data.citations)
        assert len(results[0]) == 5
        assert cited[0] == cited[1]
        assert any(name in key for key in cited[0])
        assert results[0] == pytest.approx(results[1], rel=1e-4)  # the log rounds


def run_rank(rank, world, path):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    model = model_of()
    for directions, mode in PARTITIONS:
        for hardness, strength in HARDNESS:
            options = [model, 20.0, util.cos_sim, True, directions, mode, hardness, strength]
            xs = embeddings(3, seed=rank)
            mine, theirs = (
                package.MultipleNegativesRankingLoss(*options).compute_loss_from_embeddings(xs, None)
                for package in (ours, peer)
            )
            torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=2e-6)
            for got, reference in zip(gradients(mine, xs), gradients(theirs, xs), strict=True):
                torch.testing.assert_close(got, reference, rtol=1e-4, atol=2e-5)

    # The mean over the ranks is the loss, and the gradient (as DDP averages it) is that, of the whole batch.
    xs, whole = (
        embeddings(3, seed=rank),
        [torch.cat(x).detach() for x in zip(embeddings(3, seed=0), embeddings(3, seed=1), strict=True)],
    )
    whole = [x.requires_grad_() for x in whole]
    loss_of = ours.MultipleNegativesRankingLoss(model, gather_across_devices=True, queue_size=20)
    loss = loss_of.compute_loss_from_embeddings(xs, None)
    want = formulation(whole, 20.0, True, ("query_to_doc",), "joint", None, 0.0)
    for got, reference in zip(gradients(loss, xs), gradients(want, whole), strict=True):
        torch.testing.assert_close(got / world, reference[3 * rank :][:3], rtol=1e-4, atol=1e-5)
    dist.all_reduce(loss.detach())
    assert loss.item() / world == pytest.approx(want.item(), rel=1e-5)
    torch.testing.assert_close(loss_of.queue.queue[: 3 * world], F.normalize(whole[1].detach(), dim=1))
    assert loss_of.queue.queue_valid.item() == 3 * world

    mine, parameters = train(ours, CACHED, steps=3, mini_batch_size=4, gather_across_devices=True)
    theirs, reference = train(peer, CACHED, steps=3, mini_batch_size=4, gather_across_devices=True)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    for got, target in zip(parameters, reference, strict=True):
        torch.testing.assert_close(got, target, rtol=1e-3, atol=1e-5)
    leave_group()


@pytest.mark.slow  # to import sentence-transformers, in each process
def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(run_rank, (2, tmp_path / "rendezvous"), nprocs=2)
