"""Momentum contrast on text: python examples/text.py [--seed 0]

The description of a function and its code are a positive pair, and the queue holds the negatives. The functions are
from Python's standard library, which every installation has. A function can have several keys in the queue; they are
masked by its id. After training, the descriptions of held-out functions are used to find their code.
"""

import argparse
import ast
import copy
import math
import re
import sysconfig
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moco_ext import KeyQueue, flatten_parameters_, info_nce, momentum_update_

LENGTH, VOCABULARY, HELD_OUT = 40, 8192, 500  # words of a text, words, functions
WIDTH, K, T, M = 256, 4096, 0.07, 0.99
BATCH, STEPS = 128, 600


class Encoder(nn.Module):
    """The mean of the word embeddings and a residual MLP: words [N, L] int64 -> [N, WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(VOCABULARY, WIDTH, padding_idx=0)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, words: Tensor) -> Tensor:
        mean = self.words(words)
        return mean + self.mlp(mean)


def load_functions() -> list[tuple[str, str]]:
    """The description and the code (without the name) of each function of the standard library."""
    pairs = {}
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if {"site-packages", "test", "tests"} & set(path.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # test data of other modules
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and len(node.body) > 1 and (text := ast.get_docstring(node)):
                pairs[text.split("\n\n")[0]] = "\n".join(map(ast.unparse, node.body[1:]))
    return list(pairs.items())


def load_pairs() -> Tensor:
    """[P, 2, LENGTH] int64: word indices of descriptions and code; 0 is padding, 1 a rare word."""
    texts = [
        [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", text)][:LENGTH]
        for pair in load_functions()
        for text in pair
    ]
    counts = Counter(word for text in texts for word in text)
    numbers = {word: 2 + i for i, (word, _) in enumerate(counts.most_common(VOCABULARY - 2))}
    rows = [[numbers.get(word, 1) for word in text] + [0] * (LENGTH - len(text)) for text in texts]
    return torch.tensor(rows).view(-1, 2, LENGTH)


@torch.no_grad()
def retrieval(encoder: nn.Module, pairs: Tensor) -> str:
    """Recall@1 and recall@10, in percent, of the code by its description, by cosine similarity."""
    texts, code = (F.normalize(encoder(words), dim=1) for words in pairs.unbind(1))
    scores = texts @ code.t()
    rank = (scores > scores.diagonal()[:, None]).sum(1)
    return ", ".join(f"recall@{k} {100 * (rank < k).float().mean():.1f} %" for k in (1, 10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    torch.manual_seed(parser.parse_args().seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pairs = load_pairs()
    held_out, pairs = pairs[torch.randperm(len(pairs))].to(device).tensor_split([HELD_OUT])
    encoder_q = Encoder().to(device)
    encoder_k = copy.deepcopy(encoder_q).requires_grad_(False)
    flat_q, flat_k = flatten_parameters_(encoder_q), flatten_parameters_(encoder_k)
    queue = KeyQueue(WIDTH, K, ids=True, empty=True).to(device)
    optimizer = torch.optim.AdamW(encoder_q.parameters(), lr=2e-3)
    print(f"{len(pairs)} functions for training, {len(held_out)} held out; chance: loss {math.log(K + 1):.2f}")
    print(f"step 0: {retrieval(encoder_q, held_out)}")
    for step in range(1, STEPS + 1):
        ids = torch.randperm(len(pairs), device=device)[:BATCH]
        query_words, key_words = pairs[ids].unbind(1) if step % 2 else pairs[ids].flip(1).unbind(1)
        with torch.no_grad():
            keys = encoder_k(key_words)
        loss, stats = info_nce(
            encoder_q(query_words),
            keys,
            queue.queue,
            T,
            num_valid=queue.queue_valid,
            query_ids=ids,
            queue_ids=queue.queue_ids,
            return_stats=True,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        momentum_update_([flat_k], [flat_q], M)
        queue.enqueue(keys, ids)
        if step % 100 == 0:
            accuracy = stats.accuracy()[0]
            print(f"step {step}: loss {loss:.2f}, contrast accuracy {accuracy:.0f} %, {retrieval(encoder_q, held_out)}")


if __name__ == "__main__":
    main()
