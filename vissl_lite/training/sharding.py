"""``--strategy fsdp``: a network whose parts lie in different processes (FSDP2, through Lightning).

Each process keeps its share of every weight, of its gradient and of what the optimizer knows of it,
and gets the whole of a block from the others just before it computes with it (Zhao et al. 2023,
arXiv 2304.11277; per parameter: ``torch.distributed.fsdp.fully_shard``).
"""

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from vissl_lite.errors import UserError
from vissl_lite.training.sync_batchnorm import SyncBatchNorm

STRATEGY = "fsdp"

# What Lightning can do with a network in parts.
PRECISIONS = ("auto", "32-true", "bf16-mixed", "bf16-true", "16-true")


def sharded_strategy() -> ModelParallelStrategy:
    """Lightning's strategy: all processes share one network, and checkpoints are single files."""
    return _AllProcesses(tensor_parallel_size=1, save_distributed_checkpoint=False)


class _AllProcesses(ModelParallelStrategy):
    def setup_environment(self) -> None:
        # how many there are is known by now; Lightning's own default is one share a machine
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def check_sharding(precision: str, compile: bool) -> None:
    """Raise a UserError for what does not go together with a network in parts."""
    if precision not in PRECISIONS:
        raise UserError(
            f"--strategy {STRATEGY} works with --precision {', '.join(PRECISIONS)}, not with "
            f"{precision}"
        )
    if compile:
        raise UserError(
            f"--compile and --strategy {STRATEGY} do not go together: leave one of them out"
        )


def shard(module: pl.LightningModule, mesh: DeviceMesh) -> None:
    """Cut a module's weights into as many shares as there are processes; its own one stays.

    Blocks that a network repeats are gathered one at a time, all other weights together for the
    whole of ``training_step``, whatever that does with them. Buffers stay whole. BatchNorm is
    synchronised first.

    Args:
        module: with its weights; its ``training_step`` is the only way to compute with it then.
        mesh: the processes, as ``sharded_strategy`` arranges them.
    """
    mesh = mesh["data_parallel"]
    # FSDP2 takes no weights that are channels last. What they are multiplied with still is.
    module.to(memory_format=torch.contiguous_format)
    SyncBatchNorm().apply(module)
    for block in list(repeated_blocks(module)):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(module, "training_step")


def repeated_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Blocks of a network, from the inside out: what stands in lists of at least two of a kind."""
    for child in module.children():
        yield from repeated_blocks(child)
    if isinstance(module, (nn.Sequential, nn.ModuleList)):
        kinds = {type(child) for child in module}
        if len(module) > 1 and len(kinds) == 1:
            yield from (child for child in module if any(True for _ in child.children()))


def is_sharded(module: nn.Module) -> bool:
    """Whether ``shard`` has cut it."""
    return isinstance(module, FSDPModule)


def mark_sharding(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Note in a checkpoint whether it is of a network in parts; see ``check_same_sharding``."""
    checkpoint["sharded"] = is_sharded(module)


def check_same_sharding(checkpoint: dict[str, Any], sharded: bool) -> None:
    """Raise a UserError if a checkpoint is of the other kind.

    The optimizer's states of a network in parts stand in another order.
    """
    before = checkpoint.get("sharded", False)
    if before != sharded:
        raise UserError(
            f"the run was trained {'with' if before else 'without'} --strategy {STRATEGY}: resume "
            f"it like that"
        )


@torch.no_grad()
def fill(copy: nn.Module | None, module: nn.Module) -> None:
    """Give a whole copy the weights and buffers of a sharded module. All processes have to call it.

    Args:
        copy: of the module, made before it was cut; None in all processes but the main one.
        module: cut by ``shard``.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(module, options=options)  # empty but in the main process
    if copy is not None:
        copy.load_state_dict(state)
