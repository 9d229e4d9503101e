"""Momentum contrast on text, as in Contriever (arXiv 2112.09118): python examples/text.py

Two random spans of a passage are a positive pair; a queue of momentum keys holds the negatives. Features are compared
as they are, without normalization, so logits are unbounded. The passages are Python's own reference documentation,
which every installation ships; a passage has several spans in the queue, and those are left out by its id.
"""

import copy
import math
import re
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moco_ext import KeyQueue, flatten_parameters_, info_nce, momentum_update_

PASSAGE, SPAN, VOCABULARY = 64, 24, 4096  # words
WIDTH, K, T, M = 128, 2048, 1.0, 0.98
BATCH, STEPS = 64, 400


class Encoder(nn.Module):
    """A small transformer and the mean of its outputs: words [N, L] int64 -> [N, WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(SPAN, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, words: Tensor) -> Tensor:
        return self.layers(self.words(words) + self.places).mean(1)


def load_passages() -> Tensor:
    """[P, PASSAGE] int64 numbers of words; rare ones share a number."""
    texts = [re.findall(r"[a-z_]+|[^\sa-z_]", text.lower()) for _, text in sorted(topics.items())]
    counts: dict[str, int] = {}
    for word in (word for text in texts for word in text):
        counts[word] = counts.get(word, 0) + 1
    known = {word: 1 + i for i, word in enumerate(sorted(counts, key=lambda w: (-counts[w], w))[: VOCABULARY - 1])}
    cut = [text[i : i + PASSAGE] for text in texts for i in range(0, len(text) - PASSAGE + 1, PASSAGE)]
    return torch.tensor([[known.get(word, 0) for word in passage] for passage in cut])


def spans(passages: Tensor) -> Tensor:
    """A random span of each passage: [N, PASSAGE] -> [N, SPAN]."""
    start = torch.randint(PASSAGE - SPAN + 1, (len(passages), 1), device=passages.device)
    return passages.gather(1, start + torch.arange(SPAN, device=passages.device))


@torch.no_grad()
def retrieval(encoder: nn.Module, passages: Tensor) -> float:
    """Percent of passages of which one random span finds another, by cosine, among those of all passages."""
    one, other = (F.normalize(encoder(spans(passages)), dim=1) for _ in range(2))
    scores = one @ other.t()
    return 100 * (scores.argmax(1) == torch.arange(len(passages), device=scores.device)).float().mean().item()


def main() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    passages = load_passages().to(device)
    held_out, passages = passages[::10], passages[torch.arange(len(passages), device=device) % 10 != 0]
    encoder_q = Encoder().to(device)
    encoder_k = copy.deepcopy(encoder_q).requires_grad_(False)
    flat_q, flat_k = flatten_parameters_(encoder_q), flatten_parameters_(encoder_k)
    queue = KeyQueue(WIDTH, K, ids=True, empty=True).to(device)
    optimizer = torch.optim.AdamW(encoder_q.parameters(), lr=1e-3)
    print(f"{len(passages)} passages to learn from, {len(held_out)} held out; chance: loss {math.log(K + 1):.2f}")
    print(f"step 0: retrieval among {len(held_out)} held-out passages {retrieval(encoder_q, held_out):.0f} %")
    for step in range(1, STEPS + 1):
        ids = torch.randperm(len(passages), device=device)[:BATCH]
        with torch.no_grad():
            keys = encoder_k(spans(passages[ids]))
        loss, stats = info_nce(
            encoder_q(spans(passages[ids])),
            keys,
            queue.queue,
            T,
            normalize=False,
            label_smoothing=0.1,
            num_valid=queue.queue_valid,
            query_ids=ids,
            queue_ids=queue.queue_ids,
            return_stats=True,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        momentum_update_([flat_k], [flat_q], M)
        queue.enqueue(keys, ids, normalize=False)
        if step % 100 == 0:
            score = retrieval(encoder_q, held_out)
            print(
                f"step {step}: loss {loss:.2f}, contrast accuracy {stats.accuracy()[0]:.0f} %, retrieval {score:.0f} %"
            )


if __name__ == "__main__":
    main()
