"""Momentum contrast between images and texts, as in ALBEF (arXiv 2107.07651): python examples/image_text.py

There are two pairs of encoders, two queues, and a learned temperature. Each image is contrasted with the texts of the
batch and of the text queue, and each text with the images; entries with the same id are additional positives. The
images are scikit-learn's handwritten digits, the texts short captions. After training, unseen images are classified by
the nearest caption. ALBEF's soft targets (distillation from the momentum encoders) are left out.
"""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moco_ext import KeyQueue, flatten_parameters_, info_nce, momentum_update_
from moco_ext.data import Normalize, load

DIM, K, M = 64, 512, 0.98
BATCH, STEPS = 64, 150
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEMPLATES = ("a handwritten {}", "the digit {}", "somebody wrote {} here", "{} on white paper", "this one is a {}")
WORDS = sorted({word for template in TEMPLATES for word in template.split()} | set(NAMES))


def image_encoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 9, DIM),
    )  # fmt: skip


def text_encoder() -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(len(WORDS), 64), nn.ReLU(), nn.Linear(64, DIM))


def tokens(captions: list[str]) -> Tensor:
    """Word indices [N, 5]; short captions are repeated."""
    return torch.tensor([[WORDS.index(word) for word in (caption.split() * 5)[:5]] for caption in captions])


class Side:
    """One modality: its encoder, the momentum encoder, and a queue of the keys of the momentum encoder."""

    def __init__(self, encoder: nn.Module, device: torch.device) -> None:
        self.encoder = encoder.to(device)
        self.momentum = copy.deepcopy(self.encoder).requires_grad_(False)
        self.flat = flatten_parameters_(self.momentum), flatten_parameters_(self.encoder)
        self.queue = KeyQueue(DIM, K, ids=True, empty=True).to(device)

    def loss_against(self, other: "Side", inputs: Tensor, keys: Tensor, ids: Tensor, temperature: Tensor) -> Tensor:
        """The loss with queries from this side, and the keys of the other side (batch and queue) as the dictionary."""
        queue = other.queue
        return info_nce(
            self.encoder(inputs),
            keys,
            queue.queue,
            temperature,
            in_batch=True,
            num_valid=queue.queue_valid,
            query_ids=ids,
            queue_ids=queue.queue_ids,
            same_id="positive",
        )

    def update(self, keys: Tensor, ids: Tensor) -> None:
        momentum_update_([self.flat[0]], [self.flat[1]], M)
        self.queue.enqueue(keys, ids)


@torch.no_grad()
def accuracy(image: nn.Module, text: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    """Percent of images whose nearest caption "the digit ..." is correct."""
    captions = F.normalize(text(tokens([f"the digit {name}" for name in NAMES]).to(pixels.device)), dim=1)
    return 100 * ((image(pixels) @ captions.t()).argmax(1) == labels).float().mean().item()


def main() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = load("digits")
    (train, labels), (test, test_labels) = (
        (Normalize(data)(split.images).to(device), split.labels.to(device)) for split in data.splits
    )
    image, text = Side(image_encoder(), device), Side(text_encoder(), device)
    temperature = nn.Parameter(torch.tensor(0.07, device=device))
    trained = [*image.encoder.parameters(), *text.encoder.parameters()]
    optimizer = torch.optim.AdamW([{"params": trained}, {"params": [temperature], "weight_decay": 0.0}], lr=1e-3)
    print(f"chance: loss {math.log(K + BATCH):.2f}, accuracy 10 %")
    for step in range(1, STEPS + 1):
        with torch.no_grad():
            temperature.clamp_(0.01, 0.5)
        rows = torch.randint(len(labels), (BATCH,), device=device)
        pixels, ids = train[rows], labels[rows]
        drawn = torch.randint(len(TEMPLATES), (BATCH,)).tolist()
        captions = [TEMPLATES[t].format(NAMES[n]) for t, n in zip(drawn, ids.tolist(), strict=True)]
        words = tokens(captions).to(device)
        with torch.no_grad():
            image_keys, text_keys = image.momentum(pixels), text.momentum(words)
        image_loss = image.loss_against(text, pixels, text_keys, ids, temperature)
        text_loss = text.loss_against(image, words, image_keys, ids, temperature)
        loss = (image_loss + text_loss) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        image.update(image_keys, ids)
        text.update(text_keys, ids)
        if step % 30 == 0:
            score = accuracy(image.encoder, text.encoder, test, test_labels)
            print(f"step {step}: loss {loss:.2f}, temperature {temperature.item():.3f}, accuracy {score:.0f} %")


if __name__ == "__main__":
    main()
