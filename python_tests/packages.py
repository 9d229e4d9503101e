"""State dicts of a ResNet-18 in MoCo, and the files that each package saves.

They are built from modules with the names of each package, independently of the tables in moco_ext.checkpoints.
"""

import copy
import pickle

import torch
import torchvision
from torch import nn

DIM, K = 8, 12


def mlp(width, hidden, dim):
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, dim))


def moco_v3_layers(width):
    return nn.Linear(width, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, DIM, bias=False)


class Holder(nn.Module):
    """A module with the given modules and buffers as its attributes."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            else:
                self.register_buffer(name, part)


def headless(resnet):
    resnet = copy.deepcopy(resnet)
    resnet.fc = nn.Identity()
    return resnet


def distinct(module):
    """Fill every tensor of a module with different values."""
    generator = torch.Generator().manual_seed(0)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        else:
            tensor.random_(0, 1000, generator=generator)
    return module


def queue(*shape):
    return {"queue": torch.randn(shape), "queue_ptr": torch.zeros(1, dtype=torch.long)}


def encoders(layers=2):
    """Two ResNet-18 without heads, and two heads."""
    bodies = [headless(torchvision.models.resnet18()) for _ in range(2)]
    heads = [mlp(512, 16, DIM) if layers == 2 else nn.Linear(512, DIM) for _ in range(2)]
    return *bodies, *heads


def detectron2_names(state):
    """A ResNet-18's state dict with detectron2's names."""
    names = {}
    for name in state:
        if name.startswith("fc."):
            continue
        parts = name.split(".")
        if name.startswith("layer"):
            parts[0] = f"res{int(parts[0][5:]) + 1}"
            if parts[2] == "downsample":
                parts[2:4] = ["shortcut"] if parts[3] == "0" else ["shortcut", "norm"]
            elif parts[2].startswith("bn"):
                parts[2:3] = [f"conv{parts[2][2:]}", "norm"]
        else:
            parts[:1] = ["stem", "conv1"] if parts[0] == "conv1" else ["stem", "conv1", "norm"]
        names[name] = ".".join(parts)
    return {names[name]: tensor for name, tensor in state.items() if name in names}


def native(name, layers=2):
    """A package's state dict of a ResNet-18, and the object that it saves."""
    q, k, head_q, head_k = encoders(layers)
    wrap = nn.Sequential if layers == 1 else (lambda head: head)
    if name == "moco":
        for body, head in ((q, head_q), (k, head_k)):
            body.fc = head
        model = Holder(encoder_q=q, encoder_k=k, **queue(DIM, K))
        state = {f"module.{n}": t for n, t in distinct(model).state_dict().items()}
        return state, {"epoch": 3, "arch": "resnet18", "state_dict": state, "optimizer": {"state": {}}}
    if name == "moco-v3":
        for body in (q, k):
            body.fc = nn.Sequential(*moco_v3_layers(512), nn.BatchNorm1d(DIM, affine=False))
        model = Holder(base_encoder=q, momentum_encoder=k, predictor=nn.Sequential(*moco_v3_layers(DIM)))
        state = {f"module.{n}": t for n, t in distinct(model).state_dict().items()}
        return state, {"epoch": 3, "arch": "resnet18", "state_dict": state, "scaler": {}}
    if name == "lightly":
        backbones = [nn.Sequential(*list(body.children())[:-1]) for body in (q, k)]
        heads = [Holder(layers=wrap(head)) for head in (head_q, head_k)]
        model = Holder(
            backbone=backbones[0], projection_head=heads[0], backbone_momentum=backbones[1],
            projection_head_momentum=heads[1],
        )  # fmt: skip
        state = distinct(model).state_dict()
        return state, {"epoch": 3, "state_dict": state}
    if name == "solo-learn":
        model = Holder(
            backbone=q, momentum_backbone=k, projector=wrap(head_q), momentum_projector=wrap(head_k),
            **queue(2, DIM, K),
        )  # fmt: skip
        state = distinct(model).state_dict()
        return state, {"epoch": 3, "state_dict": state}
    if name == "mmselfsup":
        necks = [Holder(mlp=head) if layers == 2 else Holder(fc=head) for head in (head_q, head_k)]
        model = Holder(encoder_q=nn.Sequential(q, necks[0]), encoder_k=nn.Sequential(k, necks[1]), **queue(DIM, K))
        model.backbone, model.neck = model.encoder_q[0], model.encoder_q[1]
        state = distinct(model).state_dict()
        return state, {"meta": {"epoch": 3}, "state_dict": state}
    if name == "mmpretrain":
        necks = [Holder(mlp=head) if layers == 2 else Holder(fc=head) for head in (head_q, head_k)]
        momentum = Holder(module=nn.Sequential(k, necks[1]), steps=torch.zeros((), dtype=torch.long))
        model = Holder(backbone=q, neck=necks[0], encoder_k=momentum, **queue(DIM, K))
        state = distinct(model).state_dict()
        return state, {"meta": {"epoch": 3}, "state_dict": state}
    if name == "vissl":
        trunks = [Holder(_feature_blocks=body) for body in (q, k)]
        blocks = [
            nn.ModuleList(
                Holder(clf=nn.Sequential(linear)) for linear in head.modules() if isinstance(linear, nn.Linear)
            )
            for head in (head_q, head_k)
        ]
        loss = Holder(moco_encoder=Holder(trunk=trunks[1], heads=blocks[1]), **queue(DIM, K))
        model = distinct(Holder(trunk=trunks[0], heads=blocks[0], loss=loss))
        parts = {"trunk": model.trunk.state_dict(), "heads": model.heads.state_dict()}
        saved = {"base_model": {"model": parts, "meta": {}}, "loss": loss.state_dict()}
        return model.state_dict(), {"phase_idx": 3, "classy_state_dict": saved}
    q.fc = nn.Linear(512, 10)
    state = distinct(q).state_dict()
    return (detectron2_names(state), None) if name == "detectron2" else (state, state)


def saved(folder, name, layers=2):
    """Save a file as the package does. Returns its path, and the package's state dict."""
    state, content = native(name, layers)
    if name == "detectron2":
        path = folder / "in.pkl"
        arrays = {n: t.numpy() for n, t in state.items()}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "MOCO", "matching_heuristics": True}))
    elif name == "safetensors":
        from safetensors.torch import save_file

        path = folder / "in.safetensors"
        save_file({n: t.clone() for n, t in state.items()}, path)
    else:
        path = folder / "in.pth"
        torch.save(content, path)
    return path, state
