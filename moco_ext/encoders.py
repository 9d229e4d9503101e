"""Base encoders by name, and their pooled features without the head."""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .vit import WIDTHS, moco_v3_vit

BaseEncoder = Callable[..., nn.Module]

# Block, and number of blocks per stage; "-small" means a 3x3 stem, for images of 8 to 64 pixels.
_RESNETS = {
    "resnet10": ("BasicBlock", (1, 1, 1, 1)),
    "resnet8-small": ("BasicBlock", (1, 1, 1)),
    "resnet10-small": ("BasicBlock", (1, 1, 1, 1)),
    "resnet18-small": ("BasicBlock", (2, 2, 2, 2)),
    "resnet34-small": ("BasicBlock", (3, 4, 6, 3)),
    "resnet50-small": ("Bottleneck", (3, 4, 6, 3)),
}
# Names of the layers after pooling in torchvision's and timm's classifiers.
HEADS = ("fc", "classifier", "heads", "head")
STAGES = ("layer1", "layer2", "layer3", "layer4")  # of a ResNet
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}  # dtype by name of the precision; "fp32": none
# By default these two return extra outputs in training mode.
_NO_AUXILIARY = {name: {"aux_logits": False, "init_weights": True} for name in ("googlenet", "inception_v3")}


def resolve(arch: str | BaseEncoder, image_size: int | None = None) -> BaseEncoder:
    """A constructor ``base_encoder(num_classes=dim) -> Module`` for a name.

    Args:
        arch: a torchvision classification model (``"resnet50"``, ``"convnext_tiny"``, ...);
            ``"resnet{8,10,18,34,50}-small"``, a ResNet with a 3x3 stride-1 stem and no max-pool, for images of 8 to 64
            pixels (ResNet-8 has three stages and 256 features); ``"resnet10"``, with one block per stage and the usual
            stem; ``"vit_small"`` and ``"vit_base"``, MoCo v3's; ``"timm:NAME"``, or a timm name that torchvision does
            not have; or a callable, which is returned.
        image_size: side of the images in pixels, for encoders that are built for one size (vision transformers); the
            others take any. None: the encoder's default.

    Raises:
        ValueError: unknown name; similar ones are suggested. The constructor raises it if the encoder cannot be built
            for this size.
        ModuleNotFoundError: the name needs timm (or torchvision), which is not installed.
    """
    if isinstance(arch, nn.Module):
        raise TypeError(
            "base_encoder: expected a name or a function base_encoder(num_classes=dim) that builds the encoder, "
            f"got an instance of {type(arch).__name__}"
        )
    if callable(arch):
        return arch
    if not isinstance(arch, str):
        raise TypeError(f"arch: expected a name or a callable, got {type(arch).__name__}")
    if arch in _RESNETS:
        return functools.partial(_resnet, arch)
    if arch in WIDTHS:
        return _of_size(functools.partial(moco_v3_vit, arch), arch, "image_size", image_size)
    if arch.startswith("timm:"):
        return _timm_encoder(arch.removeprefix("timm:"), image_size)

    from torchvision import models

    known = models.list_models(module=models)
    if arch in known:
        build = functools.partial(models.get_model, arch, weights=None, **_NO_AUXILIARY.get(arch, {}))
        return _of_size(build, arch, "image_size", image_size if arch.startswith("vit_") else None)
    if _timm_knows(arch):
        return _timm_encoder(arch, image_size)
    close = difflib.get_close_matches(arch, [*known, *_RESNETS, *WIDTHS], n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise ValueError(
        f"arch: expected a torchvision model, one of {', '.join([*_RESNETS, *WIDTHS])} or timm:NAME, got {arch!r}{hint}"
    )


def build(base_encoder: str | BaseEncoder, dim: int, mlp: bool = False) -> nn.Module:
    """Build an encoder that maps images [N, 3, H, W] to [N, dim]; ``mlp``: with MoCo v2's two-layer head."""
    encoder = resolve(base_encoder)(num_classes=dim)
    if mlp:
        add_mlp_head(encoder)
    return encoder


def encode(encoder: Callable[[Tensor], Tensor], images: Tensor, name: str = "base_encoder") -> Tensor:
    """Features [N, dim] of images [N, 3, H, W], or of sets of patches [N, P, 3, h, w]: the mean over each set.

    Raises:
        TypeError, ValueError: the encoder, which the message calls ``name``, returns anything else.
    """
    # Patch by patch, not image by image: split BatchNorm's groups (row mod G) then keep an image's patches together.
    features = encoder(images.transpose(0, 1).flatten(0, 1) if images.ndim == 5 else images)
    if not isinstance(features, Tensor):
        raise TypeError(f"{name}: expected an encoder that returns a tensor [N, dim], got {type(features).__name__}")
    if features.ndim != 2:  # the loss would take [N, L, dim] for N problems
        raise ValueError(f"{name}: expected an encoder that returns features [N, dim], got {list(features.shape)}")
    return features.view(images.shape[1], len(images), -1).mean(dim=0) if images.ndim == 5 else features


def convert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Replace every BatchNorm in a module with one that shares its statistics between ranks, in place (CUDA only)."""
    try:
        from timm.layers import convert_sync_batchnorm as convert  # knows timm's BatchNorm with activation
    except ModuleNotFoundError:
        convert = nn.SyncBatchNorm.convert_sync_batchnorm
    return convert(module)


def autocast(device: torch.device | str, precision: str) -> torch.autocast:
    """Autocast of matrix products and convolutions to "bf16" or "fp16"; with "fp32", none.

    Raises:
        ValueError: another precision.
    """
    if precision != "fp32" and precision not in AUTOCAST:
        raise ValueError(f"precision: expected one of fp32, {', '.join(AUTOCAST)}, got {precision!r}")
    return torch.autocast(torch.device(device).type, AUTOCAST.get(precision), enabled=precision in AUTOCAST)


@contextlib.contextmanager
def restored_modes(module: nn.Module) -> Iterator[None]:
    """Restore the training or evaluation mode of every layer at the end of the block."""
    modes = [(layer, layer.training) for layer in module.modules()]
    try:
        yield
    finally:
        for layer, training in modes:
            layer.training = training


def add_mlp_head(encoder: nn.Module) -> None:
    """Linear -> Linear, ReLU, Linear, in place (MoCo v2): ``fc`` becomes ``fc.0``, ``fc.2``."""
    replace_head(
        encoder, lambda head: nn.Sequential(nn.Linear(head.in_features, head.in_features), nn.ReLU(), head), "mlp"
    )


def replace_head(encoder: nn.Module, make: Callable[[nn.Linear], nn.Module], setting: str) -> None:
    """Replace the last linear layer of the encoder's head by ``make(layer)``, in place.

    Args:
        setting: what the error names.

    Raises:
        ValueError: the head has no known name, or no linear layer.
    """
    name = _head_name(encoder)
    head = getattr(encoder, name) if name else None
    layers = [] if head is None else [path for path, part in head.named_modules() if isinstance(part, nn.Linear)]
    if not layers:
        raise ValueError(
            f"{setting}: expected an encoder whose head, named one of {', '.join(HEADS)}, ends in a Linear layer, got "
            f"{type(encoder).__name__}"
        )
    path = f"{name}.{layers[-1]}".rstrip(".")
    encoder.set_submodule(path, make(encoder.get_submodule(path)))  # type: ignore[arg-type]


def with_own_head(encoder: nn.Module) -> nn.Module:
    """A second encoder with a copy of the head, which shares all other layers with the first.

    Raises:
        ValueError: the module has no head under a name known to torchvision or timm.
    """
    name = _head_name(encoder)
    if name is None:
        raise ValueError(
            f"key_encoder: expected an encoder with a head named one of {', '.join(HEADS)} for 'partial', got "
            f"{type(encoder).__name__}"
        )
    # Also what belongs to no layer, such as the class token and the positions of a vision transformer.
    parts = encoder._modules | encoder._parameters | encoder._buffers
    return copy.deepcopy(encoder, {id(part): part for part_name, part in parts.items() if part_name != name})


def backbone(encoder: nn.Module) -> nn.Module:
    """The encoder with its head replaced by the identity: ``images [N, 3, H, W] -> features [N, D]``.

    MoCo is evaluated on the pooled features under the projection head (D = 2048 in a ResNet-50, 512 in a
    ResNet-18), not on the 128-d output. Heads of v1 (one ``Linear``) and v2 (``Sequential``) both go. The
    result shares parameters, buffers and layers with ``encoder``, which keeps its own head.

    Raises:
        ValueError: the module has no head under a name known to torchvision or timm.
    """
    if hasattr(encoder, "forward_head") and hasattr(encoder, "forward_features"):  # timm: heads may also pool
        return _TimmBackbone(encoder)
    name = _head_name(encoder)
    if name is None:
        raise ValueError(
            f"encoder: expected a module with a head named one of {', '.join(HEADS)}, "
            f"got {type(encoder).__name__} with {', '.join(dict(encoder.named_children())) or 'no children'}"
        )
    headless = copy.copy(encoder)
    headless._modules = dict(encoder._modules)  # else the next line would take the head from `encoder` too
    setattr(headless, name, nn.Identity())
    return headless


def stage_maps(encoder: nn.Module, task: str) -> list[Tensor]:
    """Feature maps [1, C, h, w] of a ResNet's four stages, of an image of 64 x 64 zeros.

    Args:
        task: what the error names.

    Raises:
        ValueError: the encoder is no ResNet with four stages.
    """
    from torchvision.models._utils import IntermediateLayerGetter

    found = [isinstance(getattr(encoder, name, None), nn.Sequential) for name in STAGES]
    if not all(found):
        raise ValueError(
            f"arch: expected a ResNet with {', '.join(STAGES)} for {task}, got {type(encoder).__name__} with "
            f"{sum(found)} of them"
        )
    with torch.no_grad(), restored_modes(encoder):
        encoder.eval()
        return list(
            IntermediateLayerGetter(encoder, {name: name for name in STAGES})(torch.zeros(1, 3, 64, 64)).values()
        )


def freeze_patch_projection(encoder: nn.Module) -> nn.Module:
    """Keep the patch projection of a vision transformer at its random values (MoCo v3, section 4.2).

    Returns:
        The encoder.

    Raises:
        ValueError: the encoder has none.
    """
    for name in ("patch_embed.proj", "conv_proj"):  # timm's, torchvision's
        try:
            encoder.get_submodule(name).requires_grad_(False)
        except AttributeError:
            continue
        return encoder
    raise ValueError(
        f"stop_grad_conv1: expected a vision transformer, with a patch projection, got {type(encoder).__name__}"
    )


def zero_init_residual(encoder: nn.Module) -> nn.Module:
    """Start each residual block of a ResNet as the identity: weight 0 of its last BatchNorm (arXiv 1706.02677).

    Returns:
        The encoder.

    Raises:
        ValueError: the encoder has no such blocks.
    """
    last = [getattr(m, "bn3", getattr(m, "bn2", None)) for m in encoder.modules() if hasattr(m, "downsample")]
    norms = [norm for norm in last if isinstance(norm, nn.BatchNorm2d)]
    if not norms:
        raise ValueError(
            f"zero_init_residual: expected an encoder of residual blocks with BatchNorm, got {type(encoder).__name__}"
        )
    for norm in norms:
        nn.init.zeros_(norm.weight)
    return encoder


def layer_numbers(encoder: nn.Module) -> dict[str, int]:
    """The layer of each parameter, counted from the input, for layer-wise learning rates.

    A layer is a block (an entry of an ``nn.Sequential`` or ``nn.ModuleList``) with the parameters between it and the
    next. Layer 0 precedes the first block, and the head is a layer of its own. timm's encoders define their layers
    themselves.
    """
    matcher = getattr(encoder, "group_matcher", None)
    if matcher is not None:
        from timm.models import group_parameters

        return group_parameters(encoder, matcher(coarse=False), reverse=True)
    head, number, block = _head_name(encoder), 0, None
    numbers: dict[str, int] = {}
    for name, _ in encoder.named_parameters():
        parts = name.split(".")
        is_head = parts[0] == head
        at = None if is_head else _block(encoder, parts)
        if (at is not None and at != block) or (is_head and block != head):
            number, block = number + 1, head if is_head else at
        numbers[name] = number
    return numbers


def _block(encoder: nn.Module, parts: list[str]) -> str | None:
    """The name of the first module on a parameter's path that is an entry of a container."""
    module = encoder
    for depth, part in enumerate(parts[:-1]):
        if isinstance(module, nn.Sequential | nn.ModuleList):
            return ".".join(parts[: depth + 1])
        module = module.get_submodule(part)
    return None


def _head_name(encoder: nn.Module) -> str | None:
    return next((name for name in HEADS if isinstance(getattr(encoder, name, None), nn.Module)), None)


class _TimmBackbone(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder: Any = encoder

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder.forward_head(self.encoder.forward_features(images), pre_logits=True)


def _resnet(arch: str, num_classes: int = 128) -> nn.Module:
    from torchvision.models import resnet

    block_name, blocks = _RESNETS[arch]
    block = getattr(resnet, block_name)
    model = resnet.ResNet(block, [*blocks, 1][:4], num_classes=num_classes)
    if arch.endswith("-small"):  # at 32 pixels the ImageNet stem would leave an 8x8 map to the first stage
        model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    if len(blocks) == 3:
        model.layer4 = nn.Identity()
        model.fc = nn.Linear(256 * block.expansion, num_classes)
    return model


def _timm_encoder(name: str, image_size: int | None) -> BaseEncoder:
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        message = f"arch: timm:{name} needs timm, which is not installed: pip install timm"
        raise ModuleNotFoundError(message, name="timm") from None
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join('timm:' + c for c in close)}?" if close else ""
        raise ValueError(f"arch: expected a timm model name, got {name!r}{hint}")
    build, defaults = functools.partial(timm.create_model, name, pretrained=False), timm.get_pretrained_cfg(name)
    fixed = defaults is not None and defaults.fixed_input_size
    return _of_size(build, f"timm:{name}", "img_size", image_size if fixed else None)


def _of_size(build: BaseEncoder, arch: str, argument: str, image_size: int | None) -> BaseEncoder:
    """The constructor for images of a size; None: for the encoder's default."""
    if image_size is None:
        return build

    def build_of_size(num_classes: int) -> nn.Module:
        try:
            encoder = build(num_classes=num_classes, **{argument: image_size})
        except (AssertionError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"image_size: expected one that {arch} can take, got {image_size}: {reason}") from None
        _check_patches(encoder, arch, image_size)
        return encoder

    return build_of_size


def set_image_size(encoder: nn.Module, image_size: int) -> None:
    """Adapt a timm encoder that is built for one image size to another, in place (resampled position embedding).

    Raises:
        ValueError: the size is not a multiple of its patches'.
    """
    if hasattr(encoder, "set_input_size"):
        _check_patches(encoder, type(encoder).__name__, image_size)
        encoder.set_input_size(img_size=image_size)  # type: ignore[operator]


def _check_patches(encoder: nn.Module, name: str, image_size: int) -> None:
    patch = getattr(getattr(encoder, "patch_embed", None), "patch_size", 1)
    side = patch if isinstance(patch, int) else patch[0]
    if image_size % side:
        raise ValueError(f"image_size: expected a multiple of {side}, the patch size of {name}, got {image_size}")


def _timm_knows(name: str) -> bool:
    try:
        import timm
    except ModuleNotFoundError:
        return False
    return timm.is_model(name)
