"""A custom training loop: python examples/training_loop.py (under a minute on a CPU)."""

import math

import torch

from moco_ext import MoCo
from moco_ext.data import Augmentation, TrainLoader, load

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
data = load("digits")
loader = TrainLoader(data, Augmentation.v2(data.size, flip_p=0.0), batch_size=64, device=device, drop_last=True)

model = MoCo("resnet8-small", dim=64, K=1024, m=0.99, T=0.2, mlp=True, split_bn=8).to(device)
optimizer = torch.optim.SGD(model.encoder_q.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)

print(f"chance: loss {math.log(model.K + 1):.2f}")
for epoch in range(5):
    hits = []
    for batch in loader.epoch(epoch):
        out = model(batch.im_q, batch.im_k)  # encode both views, shuffle BN, fused loss
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        model.update(out.keys)  # momentum update, then enqueue
        hits.append(out.stats.accuracy((1, 5)))
    top1, top5 = torch.tensor(hits).mean(0)
    print(f"epoch {epoch}: loss {out.loss.item():.2f}, contrast accuracy top-1 {top1:.0f} %, top-5 {top5:.0f} %")
