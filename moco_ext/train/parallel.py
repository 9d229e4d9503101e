"""What processes share: a batch and, with FSDP2, the weights, their gradients and the optimizer's state."""

from __future__ import annotations

import copy
import warnings

import torch
import torch.distributed as dist
from torch import nn

from .. import distributed
from ..checkpoints.training import gathered
from ..encoders import convert_sync_batchnorm
from ..mechanism import Mechanism
from ..runs.options import RunOptions


def images_per_process(batch_size: int, options: RunOptions) -> int:
    """What each process of a node takes of its batch; a warning if that is not all of it."""
    share, rest = divmod(batch_size, options.local_world)
    if rest and distributed.rank() == 0:
        warnings.warn(
            f"batch_size: {batch_size} does not divide by this node's {options.local_world} processes; each takes "
            f"{share}",
            stacklevel=5,
        )
    return share


def shard_(model: Mechanism, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Shard the networks of a model over all processes with FSDP2 (``fully_shard``), in place: each block (an element
    of an ``nn.Sequential`` or ``nn.ModuleList`` that has layers of its own) and what is left of each network.

    The networks' weights and buffers become those of rank 0. The queue stays as it is. Make the optimizer afterwards.

    Args:
        dtype: of the weights in the forward and backward passes, which are gathered in it; takes the place of the
            model's low-precision copies. BatchNorm stays in float32, as under autocast, and gradients are summed in
            float32. None: that of the parameters.

    Raises:
        ValueError: two networks share layers, as those of ``key_encoder="partial"`` do.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    networks = networks_of(model)
    if len({id(p) for network in networks for p in network.parameters()}) < sum(
        len(list(network.parameters())) for network in networks
    ):
        raise ValueError("parallel: expected ddp with encoders that share layers, got fsdp")
    if model.sync_batchnorm and device.type == "cuda":
        convert_sync_batchnorm(model)
    for network in networks_of(model):
        for tensor in (*network.parameters(), *network.buffers()):
            dist.broadcast(tensor.detach(), 0)
    model._low_precision = None
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=None if dtype is None else torch.float32)
    for network in networks_of(model):
        norms: list[nn.Module] = [
            layer for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        ]
        if dtype is not None and norms:
            fully_shard([*norms], mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
        for block in _blocks(network):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(network, mesh=mesh, mp_policy=policy)


def networks_of(model: Mechanism) -> list[nn.Module]:
    """The encoders and the predictor of a model."""
    return [child for child in model.children() if next(child.parameters(), None) is not None]


def hollow_copy(network: nn.Module) -> nn.Module:
    """A copy of a network without memory for its parameters; see :func:`filled`."""
    memo = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in network.parameters()
    }
    return copy.deepcopy(network, memo)


def filled(hollow: nn.Module, sharded: nn.Module) -> nn.Module:
    """The whole network of which ``sharded`` has shards. Every rank must call it.

    Args:
        hollow: the network's :func:`hollow_copy`, made before it was sharded.
    """
    network = copy.deepcopy(hollow)
    network.load_state_dict(gathered(sharded.state_dict(), everywhere=True), assign=True)
    return network


def _blocks(network: nn.Module) -> list[nn.Module]:
    containers = (nn.Sequential, nn.ModuleList)
    return [
        block
        for container in network.modules()
        if isinstance(container, containers)
        for block in container
        if next(block.children(), None) is not None and not isinstance(block, containers)
    ]
