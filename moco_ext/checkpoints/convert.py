"""Convert checkpoints between formats, and report what became of every tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from . import files
from .fit import backbone_tensors, encoder_of
from .formats import FORMATS, Format, detect, head_name, vit_head

# Keys under which packages save the state dictionary, in order of precedence.
_HOLDERS = ("state_dict", "model", "model_state_dict", "teacher")
_HEADS = ("encoder_q.fc.", "encoder_k.fc.")


@dataclass
class Checkpoint:
    """The content of a checkpoint.

    Attributes:
        format: the format of its names.
        tensors: by canonical name.
        names: canonical name -> name in the file.
        left: entries of the file that are not part of a MoCo model -> why.
        head_name: name of the head in the encoder's own code.
        about: ``arch`` and ``epoch``, if the file contains them, and of this package's runs ``image_size``.
    """

    format: Format
    tensors: dict[str, Tensor]
    names: dict[str, str]
    left: dict[str, str]
    head_name: str
    about: dict[str, Any]


@dataclass
class Report:
    """What became of each tensor.

    Attributes:
        from_format, to: names of the formats.
        mapped: (name in the source, name in the target, shape, dtype); names without DistributedDataParallel's
            ``module.``.
        left: name in the source -> why it is not in the target.
        missing: names that the code of the target's package expects and the source has no tensor for.
    """

    from_format: str
    to: str
    mapped: list[tuple[str, str, list[int], str]] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_checkpoint(path: str | Path, from_format: str | None = None, otherwise: str | None = None) -> Checkpoint:
    """Read a checkpoint of any known format by canonical names; see :mod:`moco_ext.checkpoints.formats`.

    Args:
        from_format: a name of :data:`FORMATS`; None: detected by the tensors' names.
        otherwise: the format if the names fit none; None: raise an error.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read, or its format is unknown; the message says what was found.
    """
    path = Path(path)
    flat, about, left = _flattened(files.read(path), path)
    if from_format is not None and from_format not in FORMATS:
        raise ValueError(f"from_format: expected one of {', '.join(FORMATS)}, got {from_format!r}")
    format = detect(flat, otherwise) if from_format is None else FORMATS[from_format]
    head = head_name(flat)
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for name, tensor in flat.items():
        first = next((alias for alias in format.aliases if name.startswith(alias)), None)
        canonical = format.to_canonical(name, head)
        if first is not None:
            left[name] = f"the same as {format.aliases[first]}{name.removeprefix(first)}"
        elif canonical is None:
            left[name] = "not part of the model"
        elif canonical in tensors:
            raise ValueError(f"checkpoint: expected one tensor for {canonical}, got {names[canonical]} and {name}")
        else:
            tensors[canonical], names[canonical] = tensor, name
    if not format.single:
        for encoder in ("encoder_q.", "encoder_k."):
            _name_single_heads(encoder, tensors, names)
    if not any(name.startswith("encoder_q.") for name in tensors):
        raise ValueError(
            f"from_format: expected names of {format.title} in {path}, got {', '.join(list(flat)[:4])}, ..."
        )
    return Checkpoint(format, tensors, names, left, head, about)


def convert(
    source: str | Path,
    output: str | Path,
    to: str,
    *,
    from_format: str | None = None,
    encoder: str | None = None,
    keep_head: bool | None = None,
    arch: str | None = None,
    overwrite: bool = False,
) -> Report:
    """Convert a checkpoint to the file that another package would have saved; values and dtypes are unchanged.

    Args:
        source: the file or folder to read; nothing in it is executed.
        output: the file to write, atomically, in the format of its suffix: ``.safetensors``, ``.pkl`` (detectron2), or
            a torch file with any other.
        to: a name of :data:`FORMATS`.
        from_format: format of the source; None: detected.
        encoder: ``"q"`` or ``"k"``: only this encoder, as the query encoder. None: both if the target has both, else
            the query encoder.
        keep_head: keep the layers after pooling; None: if the target is a whole model.
        arch: name of the encoder's architecture (see :func:`moco_ext.encoders.resolve`), to check the layers against.
            The official layout also records it, by default from the source or, for a ResNet, inferred from the layers.
        overwrite: replace an existing output.

    Raises:
        FileNotFoundError, FileExistsError: no source, no folder for the output, or an existing output.
        ValueError: an argument out of range; a source of unknown format, without the requested encoder, or of another
            architecture; no tensor that the target has a place for. Nothing is written.
    """
    output = Path(output)
    if to not in FORMATS:
        raise ValueError(f"to: expected one of {', '.join(FORMATS)}, got {to!r}")
    if encoder not in (None, "q", "k"):
        raise ValueError(f"encoder: expected q or k, got {encoder!r}")
    target = FORMATS[to]
    suffix = {"detectron2": ".pkl", "safetensors": ".safetensors"}.get(to)
    if suffix is not None and output.suffix != suffix:
        raise ValueError(f"output: expected a name that ends in {suffix} for {to}, got {output}")
    if suffix is None and output.suffix == ".pkl":
        raise ValueError(f"output: expected another suffix than detectron2's .pkl for {to}, got {output}")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"output: no such folder: {output.parent}")
    if output.exists() and not overwrite:
        raise FileExistsError(f"output: {output} exists; overwrite (--force) replaces it")
    found = read_checkpoint(source, from_format)
    report = Report(found.format.name, target.name, left=dict(found.left))
    names = dict(found.names)
    tensors = _chosen(found, encoder or ("q" if target.one_encoder else None), names, report)
    if keep_head is False or (keep_head is None and target.one_encoder):
        _drop(tensors, names, report, lambda name: name.startswith(_HEADS), "the head is dropped")
    if arch is not None:
        query = query_encoder(tensors)
        backbone_tensors(encoder_of(arch, query, found.about.get("image_size")), query, arch, source)
    about = {name: value for name, value in found.about.items() if name != "image_size"}
    if target.needs_arch:
        about = {"epoch": about.get("epoch", 0), "arch": arch or about.get("arch") or _guess(tensors)}
    written = _written(tensors, names, target, found.head_name, report)
    if not written:
        raise ValueError(f"to: expected tensors that {target.title} has a place for, got none in {source}")
    content = written if output.suffix == ".safetensors" else target.wraps(written, about)
    files.write(output, content)
    return report


def query_encoder(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The query encoder's tensors, of all tensors by canonical names, under the names in the encoder's own code."""
    own = {name: tensor for name, tensor in tensors.items() if name.startswith("encoder_q.")}
    return files.without_prefix("encoder_q.", own)


def _flattened(content: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """(named tensors, ``about``, entries left out and why) of a file's content."""
    about: dict[str, Any] = {}
    left: dict[str, str] = {}
    if isinstance(content, dict) and "classy_state_dict" in content:
        state = _part(content, "classy_state_dict")
        base = _part(state, "base_model")
        parts = {**_part(base, "model"), "loss": _part(state, "loss")}
        for entries, used in ((content, ("classy_state_dict",)), (state, ("base_model", "loss")), (base, ("model",))):
            left |= {str(name): "not of the model" for name in entries if name not in used}
        left |= {name: "not of the model" for name, part in parts.items() if not isinstance(part, dict)}
        content = {f"{name}.{key}": value for name in parts for key, value in _part(parts, name).items()}
    elif isinstance(content, dict):
        holder = next((name for name in _HOLDERS if isinstance(content.get(name), dict)), None)
        if holder is not None:
            meta = {**content.get("meta", {}), **content} if isinstance(content.get("meta"), dict) else content
            about = {
                name: meta[name] for name, kind in (("arch", str), ("epoch", int)) if isinstance(meta.get(name), kind)
            }
            known = {holder, *about}
            trainer = _part(content, "trainer")
            if isinstance(trainer.get("image_size"), int):
                about["image_size"] = trainer["image_size"]
            left = {str(name): "not of the model" for name in content if name not in known}
            content = content[holder]
    if not (isinstance(content, dict) and content and all(isinstance(name, str) for name in content)):
        raise ValueError(
            f"checkpoint: expected a state dictionary, or one under {' or '.join(_HOLDERS)}, in {path}, "
            f"got {_kind(content)}"
        )
    flat = {}
    for name, value in content.items():
        if isinstance(value, Tensor):
            flat[name] = value
        else:
            left[name] = f"not a tensor but {type(value).__name__}"
    for wrapper in (files.DDP_PREFIX, "model.", files.DDP_PREFIX):  # "model." is a Lightning module's
        flat = files.without_prefix(wrapper, flat)
    if not flat:
        raise ValueError(f"checkpoint: expected a state dictionary with tensors in {path}, got {_kind(content)}")
    return flat, about, left


def _part(entries: dict[str, Any], name: str) -> dict[str, Any]:
    """The dictionary under a name; empty if there is none."""
    part = entries.get(name)
    return part if isinstance(part, dict) else {}


def _kind(content: Any) -> str:
    if isinstance(content, dict):
        return f"a dictionary of {', '.join(map(str, list(content)[:6])) or 'nothing'}"
    return type(content).__name__


def _name_single_heads(encoder: str, tensors: dict[str, Tensor], names: dict[str, str]) -> None:
    """Name the layer of a sequence of one as a head of one layer."""
    layers = [name for name in tensors if name.startswith(f"{encoder}fc.")]
    if layers and all(name.startswith(f"{encoder}fc.0.") for name in layers):
        for name in layers:
            alone = name.replace(f"{encoder}fc.0.", f"{encoder}fc.")
            tensors[alone], names[alone] = tensors.pop(name), names.pop(name)


def _chosen(found: Checkpoint, encoder: str | None, names: dict[str, str], report: Report) -> dict[str, Tensor]:
    tensors = dict(found.tensors)
    if encoder is None:
        return tensors
    wanted = f"encoder_{encoder}."
    if not any(name.startswith(wanted) for name in tensors):
        raise ValueError(f"encoder: expected one that {found.format.title} holds here, got {encoder}")
    _drop(tensors, names, report, lambda name: not name.startswith(wanted), f"not of encoder {encoder}")
    as_query = {name: name.replace(wanted, "encoder_q.", 1) for name in tensors}
    for name, new in as_query.items():
        names[new] = names.pop(name)
    return {as_query[name]: tensor for name, tensor in tensors.items()}


def _drop(
    tensors: dict[str, Tensor], names: dict[str, str], report: Report, which: Callable[[str], bool], why: str
) -> None:
    for name in [name for name in tensors if which(name)]:
        del tensors[name]
        report.left[names.pop(name)] = why


def _written(
    tensors: Mapping[str, Tensor], names: Mapping[str, str], target: Format, head: str, report: Report
) -> dict[str, Tensor]:
    """The tensors by the target's names; fills in the report."""
    body = [target.from_canonical(name, head) or "" for name in tensors if not name.startswith(_HEADS)]
    head = vit_head(body) or head
    layers = target.layers(head)

    def renamed(name: str) -> str | None:
        new = target.from_canonical(name, head)
        return None if layers and name.startswith((*_HEADS, "predictor.")) and new not in layers else new

    written = {}
    for name, tensor in tensors.items():
        new = renamed(name)
        if new is None:
            report.left[names[name]] = f"{target.title} has no place for it"
        elif name == "queue" and tensor.dim() != target.queue_dims:
            shape = "[2, C, K]" if target.queue_dims == 3 else "[C, K]"
            report.left[names[name]] = f"{target.title}'s queue is {shape}"
        else:
            copies = [new.replace(first, alias, 1) for alias, first in target.aliases.items() if new.startswith(first)]
            for place in (new, *copies):
                written[place] = tensor
                dtype = str(tensor.dtype).removeprefix("torch.")
                report.mapped.append((names[name], place, list(tensor.shape), dtype))
    if not target.one_encoder:
        of_keys = [name.replace("encoder_q.", "encoder_k.", 1) for name in tensors if name.startswith("encoder_q.")]
        queue = [part for part in ("queue", "queue_ptr") if part in target.prefixes]
        expected = [*map(renamed, of_keys + queue), *layers, *target.counters]
        report.missing += [name for name in dict.fromkeys(expected) if name is not None and name not in written]
    return written


_DEPTHS: dict[tuple[object, ...], str] = {
    ("basic", 2, 2, 2, 2): "resnet18",
    ("basic", 3, 4, 6, 3): "resnet34",
    ("bottleneck", 3, 4, 6, 3): "resnet50",
    ("bottleneck", 3, 4, 23, 3): "resnet101",
    ("bottleneck", 3, 8, 36, 3): "resnet152",
}


def _guess(tensors: Mapping[str, Tensor]) -> str:
    """Name of a ResNet of the usual widths, inferred from its layers."""
    blocks = [len({n.split(".")[2] for n in tensors if n.startswith(f"encoder_q.layer{i}.")}) for i in range(1, 5)]
    kind = "bottleneck" if "encoder_q.layer1.0.conv3.weight" in tensors else "basic"
    stem, inner = (tensors.get(f"encoder_q.{name}.weight") for name in ("conv1", "layer1.0.conv1"))
    usual = stem is not None and inner is not None and (stem.shape[-1], inner.shape[0]) == (7, 64)
    name = _DEPTHS.get((kind, *blocks)) if usual else None
    if name is None:
        raise ValueError("arch: expected the encoder's architecture, as the source does not say, got none")
    return name
