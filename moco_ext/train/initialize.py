"""Start a model from pretrained weights."""

from __future__ import annotations

import dataclasses

from torch import nn

from ..checkpoints.fit import Loaded, load_fitting
from ..checkpoints.formats import head_name
from ..checkpoints.pretrained import read_weights
from ..mechanism import Mechanism

_LISTED = 4


def initialize_(model: Mechanism, source: str, arch: str) -> tuple[Loaded, str | None]:
    """Load pretrained weights into the query encoder, in place, and make the key encoder equal to it.

    The head is loaded if it fits, and so is a predictor. A key encoder of another architecture is left as it is.

    Args:
        source: see :func:`moco_ext.checkpoints.pretrained.read_weights`.
        arch: architecture of the query encoder.

    Returns:
        What became of the tensors, and the architecture that the source names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the source cannot be read, or less than half of the encoder's weights below the head fit.
    """
    tensors, said = read_weights(source, arch)
    encoder, head = model.encoder_q, head_name(model.encoder_q.state_dict())
    found = {}
    for name, value in tensors.items():
        first, dot, rest = name.partition(".")
        if first != "predictor":
            found[f"{head}{dot}{rest}" if first == "fc" else name] = value
    loaded = load_fitting(encoder, found, arch, source)
    own = model.state_dict()
    predictor = {name: value for name, value in tensors.items() if name.startswith("predictor.")}
    fitting = {name: value for name, value in predictor.items() if name in own and own[name].shape == value.shape}
    model.load_state_dict(fitting, strict=False)
    key_encoder = model._modules.get("encoder_k")
    left = list(loaded.left)
    if isinstance(key_encoder, nn.Module):
        if _shapes(key_encoder) == _shapes(encoder):
            key_encoder.load_state_dict(encoder.state_dict())
        else:
            left.append("the key encoder, of another architecture")
    left += [name for name in own if name.startswith("predictor.") and name not in fitting]
    reasons = {name: f"not in {arch}'s model" for name in predictor if name not in fitting}
    return dataclasses.replace(
        loaded, loaded=[*loaded.loaded, *fitting], skipped=loaded.skipped | reasons, left=left
    ), said


def describe(loaded: Loaded, source: str, arch: str, said: str | None) -> str:
    """A short report: loaded, skipped and why, left at random."""
    lines = [
        f"init: {len(loaded.loaded)} tensors of {source} ({loaded.share:.1%} of the weights of {arch} below its head)"
    ]
    if said not in (None, arch):
        lines.append(f"  these weights are of {said}, by their own account")
    if loaded.skipped:
        lines.append("  skipped: " + _few([f"{name} ({why})" for name, why in loaded.skipped.items()]))
    if loaded.left:
        lines.append("  at random: " + _few(loaded.left))
    return "\n".join(lines)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def _few(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
