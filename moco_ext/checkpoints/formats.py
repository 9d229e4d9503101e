"""The names that each package gives the tensors of a MoCo model.

Conversion goes through canonical names, the official ones: ``encoder_q.*``, ``encoder_k.*``, ``queue``, ``queue_ptr``
and MoCo v3's ``predictor.*``. The head of an encoder is ``fc.weight`` (one layer) or ``fc.0.weight``, ``fc.2.weight``,
... (indices in its ``nn.Sequential``). All other layers have the names in the encoder's own code, torchvision's for
ResNets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .files import DDP_PREFIX, to_array, with_prefix

Rename = Callable[[str], str | None]  # of a name without its prefix; None: not in the format
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Format:
    """The names of one package.

    Attributes:
        title: name of the package in messages.
        prefixes: prefixes of the names of each part: ``q``, ``k`` (the encoders), ``q.head``, ``k.head``,
            ``predictor``; and the full names of ``queue`` and ``queue_ptr``. The format has no other parts. ``{head}``
            stands for the name of the head in the encoder's own code.
        single: prefixes of a head of one layer, where it is not in a sequence.
        aliases: prefixes of second copies that the format contains -> prefixes of the originals.
        backbone: (from the format, to the format) for names of an encoder without its head.
        heads: the same for names of a head: ``0.weight``.
        layers: names of all head and predictor tensors in the package's code, given the name of the head; none if it
            supports any.
        counters: names of other buffers that the package's code expects.
        wraps: makes the object that the package saves, from named tensors and ``arch`` and ``epoch``.
        needs_arch: whether that object contains the architecture.
        queue_dims: dimensions of the queue, [C, K] or [2, C, K].
    """

    name: str
    title: str
    prefixes: Mapping[str, str]
    single: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    backbone: tuple[Rename, Rename] = (lambda name: name, lambda name: name)
    heads: tuple[Rename, Rename] = (lambda name: name, lambda name: name)
    layers: Callable[[str], Collection[str]] = lambda head: ()
    counters: Collection[str] = ()
    wraps: Callable[[Tensors, Mapping[str, Any]], Any] = lambda tensors, about: dict(tensors)
    needs_arch: bool = False
    queue_dims: int = 2

    @property
    def one_encoder(self) -> bool:
        return "k" not in self.prefixes

    def to_canonical(self, name: str, head: str) -> str | None:
        """The canonical name, or None if the name is not part of a MoCo model."""
        for part in ("queue", "queue_ptr"):
            if name == self.prefixes.get(part):
                return part
        for part in ("k.head", "q.head"):
            alone = _after(self.single.get(part), name, head)
            if alone in ("weight", "bias"):
                return f"encoder_{part[0]}.fc.{alone}"
            layer = _after(self.prefixes.get(part), name, head)
            if layer and layer[0].isdigit():
                layer = self.heads[0](layer)
                return layer and f"encoder_{part[0]}.fc.{layer}"
        for part in ("k", "q"):
            body = _after(self.prefixes.get(part), name, head)
            if body:
                body = self.backbone[0](body)
                return body and f"encoder_{part}.{body}"
        rest = _after(self.prefixes.get("predictor"), name, head)
        return rest and f"predictor.{rest}"

    def from_canonical(self, name: str, head: str) -> str | None:
        """The name in this format, or None if it has no place for that tensor."""
        if name in ("queue", "queue_ptr"):
            return self.prefixes.get(name)
        first, _, rest = name.partition(".")
        if first == "predictor":
            prefix = self.prefixes.get("predictor")
            return None if prefix is None else prefix + rest
        part = first[-1]
        into = self.backbone[1]
        if rest.startswith("fc."):
            rest = rest.removeprefix("fc.")
            part, into = f"{part}.head", self.heads[1]
            if not rest[:1].isdigit():
                if part in self.single:
                    return self.single[part].format(head=head) + rest
                rest = f"0.{rest}"
        prefix, renamed = self.prefixes.get(part), into(rest)
        return None if prefix is None or renamed is None else prefix.format(head=head) + renamed


def _after(prefix: str | None, name: str, head: str) -> str | None:
    """The rest of a name after a prefix; None if the name does not start with it, or there is no prefix."""
    prefix = None if prefix is None else prefix.format(head=head)
    return name.removeprefix(prefix) if prefix is not None and name.startswith(prefix) else None


def head_name(names: Collection[str]) -> str:
    """Name of the head in the code of the encoder that has these tensors."""
    found = {
        m[1]
        for name in names
        if (m := re.match(rf"(?:{_ENCODERS})?(fc|heads\.head|head\.fc|head|classifier)\.(?:weight|bias|\d)", name))
    }
    return found.pop() if len(found) == 1 else vit_head(names) or "fc"


def vit_head(names: Collection[str]) -> str | None:
    """The same for vision transformers, inferred from other names: timm's and MoCo v3's, or torchvision's."""
    if any(name.endswith("cls_token") or ".blocks.0." in f".{name}" for name in names):
        return "head"
    return "heads.head" if any(name.endswith("conv_proj.weight") for name in names) else None


_ENCODERS = r"encoder_q\.|base_encoder\."


# --- names of encoders ------------------------------------------------------------------------------------------------

_CHILDREN = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
_BY_NUMBER = {number: name for name, number in _CHILDREN.items()}


def _first(rename: Mapping[str, str]) -> Rename:
    def renamed(name: str) -> str:
        first, dot, rest = name.partition(".")
        return rename.get(first, first) + dot + rest

    return renamed


# A ResNet as nn.Sequential(*list(resnet.children())[:-1]), as in Lightly's examples.
_NUMBERED = (_first(_BY_NUMBER), _first(_CHILDREN))

_DETECTRON2 = [
    (r"^(conv1|bn1)\.", r"stem.\1."),
    (r"^layer(\d)\.", lambda m: f"res{int(m[1]) + 1}."),
    (r"(?<=\.)bn(\d)\.", r"conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
]
_FROM_DETECTRON2 = [
    (r"\.shortcut\.norm\.", ".downsample.1."),
    (r"\.shortcut\.", ".downsample.0."),
    (r"conv(\d)\.norm\.", r"bn\1."),
    (r"^stem\.", ""),
    (r"^res(\d)\.", lambda m: f"layer{int(m[1]) - 1}."),
]
_VIT = [  # torchvision -> timm
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"^(blocks\.\d+)\.ln_(\d)\.", r"\1.norm\2."),
    (r"^(blocks\.\d+)\.self_attention\.in_proj_", r"\1.attn.qkv."),
    (r"^(blocks\.\d+)\.self_attention\.out_proj\.", r"\1.attn.proj."),
    (r"^(blocks\.\d+)\.mlp\.0\.", r"\1.mlp.fc1."),
    (r"^(blocks\.\d+)\.mlp\.3\.", r"\1.mlp.fc2."),
]
_TO_VIT = [  # timm -> torchvision
    (r"^cls_token$", "class_token"),
    (r"^patch_embed\.proj\.", "conv_proj."),
    (r"^pos_embed$", "encoder.pos_embedding"),
    (r"^norm\.", "encoder.ln."),
    (r"^(blocks\.\d+)\.norm(\d)\.", r"\1.ln_\2."),
    (r"^(blocks\.\d+)\.attn\.qkv\.", r"\1.self_attention.in_proj_"),
    (r"^(blocks\.\d+)\.attn\.proj\.", r"\1.self_attention.out_proj."),
    (r"^(blocks\.\d+)\.mlp\.fc1\.", r"\1.mlp.0."),
    (r"^(blocks\.\d+)\.mlp\.fc2\.", r"\1.mlp.3."),
    (r"^blocks\.(\d+)\.", r"encoder.layers.encoder_layer_\1."),
]


def _substituted(rules: list) -> Rename:
    def renamed(name: str) -> str:
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        return name

    return renamed


def _resnets_only(name: str) -> str | None:
    """detectron2 has ResNets only."""
    return _substituted(_DETECTRON2)(name) if re.match(r"(conv1|bn1|layer\d)\.", name) else None


# --- names of heads ---------------------------------------------------------------------------------------------------


def _from_blocks(name: str) -> str | None:
    """VISSL: one block per linear layer, ``1.clf.0.weight``, or one block of several, ``0.clf.2.weight``."""
    found = re.fullmatch(r"(\d)\.clf\.(\d)\.(weight|bias)", name)
    return None if found is None else f"{2 * int(found[1]) + int(found[2])}.{found[3]}"


def _to_blocks(name: str) -> str | None:
    found = re.fullmatch(r"([02468])\.(weight|bias)", name)
    return None if found is None else f"{int(found[1]) // 2}.clf.0.{found[2]}"


def _moco_v3_layers(head: str) -> list[str]:
    """Linear layers without bias, with BatchNorm and ReLU in between and a BatchNorm without weights at the end."""
    is_resnet = head == "fc"
    projector = _mlp(2 if is_resnet else 3, last_bn=True)
    encoders = [f"{encoder}.{head}.{name}" for encoder in ("base_encoder", "momentum_encoder") for name in projector]
    return encoders + [f"predictor.{name}" for name in _mlp(2, last_bn=not is_resnet)]


def _mlp(layers: int, last_bn: bool) -> list[str]:
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    names = []
    for i in range(layers):
        is_last = i == layers - 1
        names.append(f"{3 * i}.weight")
        if not is_last or last_bn:
            names += [f"{3 * i + 1}.{name}" for name in (*(() if is_last else ("weight", "bias")), *statistics)]
    return names


# --- what each package saves -----------------------------------------------------------------------------------------


def _official(tensors: Tensors, about: Mapping[str, Any]) -> Any:
    return {**about, "state_dict": with_prefix(DDP_PREFIX, tensors)}


def _under_state_dict(tensors: Tensors, about: Mapping[str, Any]) -> Any:
    return {"epoch": about.get("epoch", 0), "state_dict": dict(tensors)}


def _openmmlab(tensors: Tensors, about: Mapping[str, Any]) -> Any:
    return {"meta": dict(about), "state_dict": dict(tensors)}


def _classy(tensors: Tensors, about: Mapping[str, Any]) -> Any:
    def under(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): tensor for n, tensor in tensors.items() if n.startswith(prefix)}

    model = {"model": {"trunk": under("trunk."), "heads": under("heads.")}}
    state = {"base_model": model, "loss": under("loss.")}
    return {"phase_idx": about.get("epoch", 0), "classy_state_dict": state, "type": "checkpoint"}


def _detectron2(tensors: Tensors, about: Mapping[str, Any]) -> Any:
    arrays = {name: to_array(name, tensor) for name, tensor in tensors.items()}
    return {"model": arrays, "__author__": "moco_ext", "matching_heuristics": True}


_QUEUE = {"queue": "queue", "queue_ptr": "queue_ptr"}
_PLAIN = {"q": "", "q.head": "{head}."}

FORMATS = {
    format.name: format
    for format in (
        Format(
            "moco",
            "MoCo v1 and v2, official, and this package",
            {
                "q": "encoder_q.",
                "q.head": "encoder_q.{head}.",
                "k": "encoder_k.",
                "k.head": "encoder_k.{head}.",
                "predictor": "predictor.",
                **_QUEUE,
            },
            single={"q.head": "encoder_q.{head}.", "k.head": "encoder_k.{head}."},
            wraps=_official,
            needs_arch=True,
        ),
        Format(
            "moco-v3",
            "MoCo v3, official",
            {
                "q": "base_encoder.",
                "q.head": "base_encoder.{head}.",
                "k": "momentum_encoder.",
                "k.head": "momentum_encoder.{head}.",
                "predictor": "predictor.",
            },
            single={"q.head": "base_encoder.{head}.", "k.head": "momentum_encoder.{head}."},
            layers=_moco_v3_layers,
            wraps=_official,
            needs_arch=True,
        ),
        Format(
            "lightly",
            "Lightly's examples",
            {
                "q": "backbone.",
                "q.head": "projection_head.layers.",
                "k": "backbone_momentum.",
                "k.head": "projection_head_momentum.layers.",
                "predictor": "prediction_head.layers.",
            },
            backbone=_NUMBERED,
            wraps=_under_state_dict,
        ),
        Format(
            "solo-learn",
            "solo-learn's MoCo v2+ and v3",
            {
                "q": "backbone.",
                "q.head": "projector.",
                "k": "momentum_backbone.",
                "k.head": "momentum_projector.",
                "predictor": "predictor.",
                **_QUEUE,
            },
            wraps=_under_state_dict,
            queue_dims=3,
        ),
        Format(
            "mmselfsup",
            "MMSelfSup and OpenSelfSup 0.x",
            {
                "q": "encoder_q.0.",
                "q.head": "encoder_q.1.mlp.",
                "k": "encoder_k.0.",
                "k.head": "encoder_k.1.mlp.",
                **_QUEUE,
            },
            single={"q.head": "encoder_q.1.fc.", "k.head": "encoder_k.1.fc."},
            aliases={"backbone.": "encoder_q.0.", "neck.": "encoder_q.1."},
            wraps=_openmmlab,
        ),
        Format(
            "mmpretrain",
            "MMPretrain and MMSelfSup 1.x",
            {
                "q": "backbone.",
                "q.head": "neck.mlp.",
                "k": "encoder_k.module.0.",
                "k.head": "encoder_k.module.1.mlp.",
                **_QUEUE,
            },
            single={"q.head": "neck.fc.", "k.head": "encoder_k.module.1.fc."},
            counters=("encoder_k.steps",),
            wraps=_openmmlab,
        ),
        Format(
            "vissl",
            "VISSL",
            {
                "q": "trunk._feature_blocks.",
                "q.head": "heads.",
                "k": "loss.moco_encoder.trunk._feature_blocks.",
                "k.head": "loss.moco_encoder.heads.",
                "queue": "loss.queue",
                "queue_ptr": "loss.queue_ptr",
            },
            heads=(_from_blocks, _to_blocks),
            wraps=_classy,
        ),
        Format(
            "torchvision",
            "torchvision",
            _PLAIN,
            single={"q.head": "{head}."},
            backbone=(lambda name: name, _substituted(_TO_VIT)),
        ),
        Format(
            "timm",
            "timm",
            _PLAIN,
            single={"q.head": "{head}."},
            backbone=(lambda name: name, _substituted(_VIT)),
        ),
        Format(
            "detectron2",
            "detectron2 (.pkl)",
            {"q": "", "q.head": "stem.fc."},
            single={"q.head": "stem.fc."},
            backbone=(_substituted(_FROM_DETECTRON2), _resnets_only),
            wraps=_detectron2,
        ),
        Format("safetensors", "the encoder's own names, in safetensors", _PLAIN, single={"q.head": "{head}."}),
    )
}


def detect(names: Collection[str], otherwise: str | None = None) -> Format:
    """The format that has these names; names of an encoder alone are torchvision's or timm's.

    Args:
        otherwise: name of the format to return if the names fit none; None: raise an error.

    Raises:
        ValueError: the names fit no format; the message says what was found.
    """

    def starts(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in names)

    def of(name: str, *signs: bool) -> str | None:
        return name if all(signs) else None

    found = (
        of("vissl", starts("trunk.", "loss.moco_encoder."))
        or of("mmselfsup", starts("encoder_q.0."), starts("encoder_q.1.", "backbone."))
        or of("moco", starts("encoder_q.", "encoder_k."), not starts("backbone."))
        or of("moco-v3", starts("base_encoder.", "momentum_encoder."))
        or of("lightly", starts("backbone.", "backbone_momentum."), starts("projection_head", "backbone_momentum."))
        or of("lightly", starts("backbone.0."))
        or of("solo-learn", starts("backbone.", "momentum_backbone."), starts("projector.", "momentum_backbone."))
        or of("mmpretrain", starts("backbone."))
        or of("detectron2", starts("stem.conv1.", "res2."))
        or of("timm", starts("cls_token", "patch_embed.", "blocks."))
        or of("torchvision", starts("conv1.", "features.", "conv_proj.", "layer1."))
        or otherwise
    )
    if found is None:
        some = ", ".join(list(names)[:4])
        raise ValueError(
            f"from_format: expected one of {', '.join(FORMATS)}, as the names fit none of them, got {some}, ..."
        )
    return FORMATS[found]
