"""From a run to files that other software reads: :func:`export`."""

from __future__ import annotations

import io
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import __version__
from ..checkpoints import FORMATS, files
from ..checkpoints.formats import head_name, vit_head
from ..encoders import restored_modes
from ..evaluate import hub
from ..evaluate.encoder import Encoder, load_encoder
from ..evaluate.model_card import check_replaceable, write_card
from ..report.model_card import training_section
from ..runs.files import write_atomically

EXPORTS = ("torchvision", "timm", "safetensors", "onnx", "torch-export", "hub")
_BY_SUFFIX = {".pth": "torchvision", ".pt": "torchvision", ".safetensors": "safetensors", ".onnx": "onnx"}
_BY_SUFFIX |= {".pt2": "torch-export", "": "hub"}
_SUFFIXES = {
    "torchvision": (".pth", ".pt", ".safetensors"),
    "timm": (".pth", ".pt", ".safetensors"),
    "safetensors": (".safetensors",),
    "onnx": (".onnx",),
    "torch-export": (".pt2",),
    "hub": ("",),
}
_CHECKED_BATCHES = (1, 2, 5)
_TOLERANCE = 1e-5  # of the largest feature


def export(
    source: str | Path | Encoder,
    output: str | Path,
    format: str | None = None,
    *,
    arch: str | None = None,
    head: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write an encoder for other software.

    A program (``.onnx``, ``.pt2``) takes normalized images, float32 [N, 3, size, size] with any N, as ``images`` and
    returns ``features`` [N, D]. It is run at several batch sizes, and written only if its features differ from the
    encoder's by at most 1e-5 of the largest one. Its metadata describe the preprocessing.

    Args:
        source: for :func:`moco_ext.load_encoder`, with ``arch`` and ``head``; or an encoder.
        output: file, or folder for the hub.
        format: ``"torchvision"`` or ``"timm"``, a state dict with that package's names; ``"safetensors"``, the
            weights with a model card ``README.md`` next to them; ``"onnx"``; ``"torch-export"``, for
            ``torch.export.load``; or ``"hub"``, a folder in the layout of the Hugging Face hub, which
            :func:`moco_ext.load_encoder` and timm read. By default the output's suffix decides.
        overwrite: replace existing files.

    Raises:
        FileNotFoundError, FileExistsError: no source, no folder for the output, or an existing output.
        ModuleNotFoundError: the format needs a package that is not installed.
        ValueError: an argument out of range, or weights that the format has no names for.
        RuntimeError: an exported program computes other features.
    """
    output = Path(output)
    format = _format_of(output, format)
    if not output.parent.is_dir():
        raise FileNotFoundError(f"output: no such folder: {output.parent}")
    found = output / hub.WEIGHTS if format == "hub" else output
    if found.exists() and not overwrite:
        raise FileExistsError(f"output: {found} exists; overwrite (--force) replaces it")
    if format == "hub":
        hub.check_folder(output)
    elif format == "safetensors":
        check_replaceable(output.parent / "README.md")
    if format == "onnx":
        import onnx  # noqa: F401  # before the weights are read
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    encoder = source if isinstance(source, Encoder) else load_encoder(source, arch, head=head)[0]
    write: dict[str, Callable[[Encoder, Path], None]] = {
        "torchvision": lambda encoder, path: _write_state(encoder, path, "torchvision"),
        "timm": lambda encoder, path: _write_state(encoder, path, "timm"),
        "safetensors": _write_safetensors,
        "onnx": _write_onnx,
        "torch-export": _write_program,
        "hub": lambda encoder, path: encoder.save_pretrained(path, card=_card(encoder, path)),
    }
    with restored_modes(encoder):
        write[format](encoder.eval().cpu(), output)
    return output


def _format_of(output: Path, format: str | None) -> str:
    if format is None:
        format = _BY_SUFFIX.get(output.suffix)
        if format is None:
            known = ", ".join(filter(None, _BY_SUFFIX))
            raise ValueError(f"output: expected a folder, or a name that ends in {known}, got {output}")
    if format not in EXPORTS:
        raise ValueError(f"format: expected one of {', '.join(EXPORTS)}, got {format!r}")
    suffixes = _SUFFIXES[format]
    if format != "hub" and output.suffix not in suffixes:
        raise ValueError(f"output: expected a name that ends in {' or '.join(suffixes)} for {format}, got {output}")
    if format == "hub" and output.is_file():
        raise ValueError(f"output: expected a folder for hub, got {output}")
    return format


def _write_state(encoder: Encoder, output: Path, format: str) -> None:
    """A state dict with the names of torchvision or timm."""
    tensors = {name: tensor.detach() for name, tensor in encoder.tensors().items()}
    names, head = FORMATS[format], head_name(tensors)
    canonical = {names.to_canonical(name, head) or "": tensor for name, tensor in tensors.items()}
    head = vit_head([names.from_canonical(name, head) or "" for name in canonical]) or head
    files.write(output, {names.from_canonical(name, head): tensor for name, tensor in canonical.items()})


def _write_safetensors(encoder: Encoder, output: Path) -> None:
    write_card(output.parent / "README.md", _card(encoder, output))
    files.write(output, {name: tensor.detach() for name, tensor in encoder.tensors().items()}, _metadata(encoder))


def _metadata(encoder: Encoder) -> dict[str, str]:
    """All values are JSON."""
    about = {"arch": encoder.arch, "transform": encoder.transform.as_dict(), "num_features": encoder.num_features}
    return {name: json.dumps(value) for name, value in about.items()} | {"moco_ext": __version__}


def _card(encoder: Encoder, output: Path) -> str:
    return encoder.card(str(output), training_section(encoder.source))


def _example(encoder: Encoder, batch: int) -> Tensor:
    size = encoder.transform.size
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


def _exported(encoder: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(encoder, (example,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})


def _write_program(encoder: Encoder, output: Path) -> None:
    buffer = io.BytesIO()
    torch.export.save(_exported(encoder, _example(encoder, 2)), buffer, extra_files=_metadata(encoder))
    buffer.seek(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # nothing writes to it
        loaded = torch.export.load(buffer).module()
    _check(encoder, lambda images: loaded(images), output)
    write_atomically(output, lambda file: file.write(buffer.getbuffer()))


def _write_onnx(encoder: Encoder, output: Path) -> None:
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch's exporter about torch
        program = torch.onnx.export(
            encoder,
            (_example(encoder, 2),),
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(_metadata(encoder))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, output.name)
        program.save(path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        _check(encoder, lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), output)
        write_atomically(output, lambda file: file.write(path.read_bytes()))


@torch.no_grad()
def _check(encoder: Encoder, program: Callable[[Tensor], Tensor], output: Path) -> None:
    """Raise unless the program computes the features of the encoder at several batch sizes."""
    for batch in _CHECKED_BATCHES:
        images = _example(encoder, batch)
        expected = encoder(images)
        error = float((program(images) - expected).abs().max() / expected.abs().max())
        if not error <= _TOLERANCE:
            raise RuntimeError(
                f"output: expected {output.name} to compute the features of {encoder.arch} within {_TOLERANCE:g} of "
                f"the largest, got {error:.2g} at batch size {batch}; nothing is written"
            )
