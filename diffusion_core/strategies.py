"""How training is spread over processes: replicas (ddp), shards (fsdp), or shards within a node (hsdp)."""

from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from diffusion_core.config import Strategy
from diffusion_core.unet import Block, UNet


@dataclass(frozen=True)
class Ranks:
    """A process among those that train together: its rank, their number, those on its node, and its device."""

    rank: int = 0
    world: int = 1
    local_world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        """Raise ValueError where the numbers do not fit one another."""
        if not 0 <= self.rank < self.world or not 1 <= self.local_world <= self.world:
            raise ValueError(
                f"rank {self.rank} of {self.world}, {self.local_world} on its node; need 0 <= rank < world and "
                "1 to world of them on a node"
            )

    def alone(self) -> "Ranks":
        """The same device without the others."""
        return replace(self, rank=0, world=1, local_world=1)


def distribute(
    network: UNet, strategy: Strategy, ranks: Ranks, precision: str = "float32", compiled: bool = False
) -> nn.Module:
    """The network on the rank's device, in the layout that training wants; call its answer, update `network` itself.

    `compiled` compiles every block by itself, since blocks of one shape then share what was compiled. With "ddp" every
    process holds all weights; with "fsdp" and "hsdp" each holds its share (FSDP2), gathered block by block; a process
    alone has nobody to share with. A process group must exist where there are several ranks. Raises ValueError where
    "hsdp" does not divide.
    """
    shards = strategy != "ddp" and ranks.world > 1
    # fully_shard takes weights in the plain layout alone; pictures are channels last in any case.
    layout = torch.contiguous_format if shards else torch.channels_last
    network = network.to(ranks.device, memory_format=layout)  # type: ignore[call-overload]
    if compiled:
        for block in _blocks(network):
            block.compile(dynamic=False)
    if shards:
        return shard(network, mesh_of(strategy, ranks), precision)
    if ranks.world > 1:
        return DistributedDataParallel(network, gradient_as_bucket_view=True, forward_sync_buffers=False)
    return network


def mesh_of(strategy: Strategy, ranks: Ranks) -> DeviceMesh:
    """All ranks in a line for "fsdp"; nodes by ranks of a node for "hsdp", which shards along the second.

    Raises ValueError where nodes do not hold equally many ranks.
    """
    kind = ranks.device.type
    if strategy == "fsdp":
        return init_device_mesh(kind, (ranks.world,))
    nodes, left = divmod(ranks.world, ranks.local_world)
    if left:
        raise ValueError(
            f"hsdp: {ranks.world} workers do not fill nodes of {ranks.local_world}; use fsdp, or equally many a node"
        )
    return init_device_mesh(kind, (nodes, ranks.local_world), mesh_dim_names=("replicate", "shard"))


def shard(network: UNet, mesh: DeviceMesh, precision: str = "float32") -> UNet:
    """The network with every block's parameters sharded over `mesh` (FSDP2), gathered one block at a time.

    With "bfloat16" they travel in that precision; what is kept and summed stays float32.
    """
    travels = torch.bfloat16 if precision == "bfloat16" else None
    policy = MixedPrecisionPolicy(param_dtype=travels, reduce_dtype=torch.float32 if travels else None,
                                  cast_forward_inputs=False)  # fmt: skip
    for block in _blocks(network):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # The root's own weights, too, go after a forward pass: one without a backward pass (validation) would leave them.
    fully_shard(network, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return network


def control_group(ranks: Ranks) -> dist.ProcessGroup | None:
    """A group of all ranks by which processors, not devices, agree on small things; None for a rank alone."""
    return dist.new_group(backend="gloo") if ranks.world > 1 else None


def _blocks(network: UNet) -> list[Block]:
    return [module for module in network.modules() if isinstance(module, Block)]
