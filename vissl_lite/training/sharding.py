"""``--strategy fsdp``: a network sharded over processes (FSDP2 through Lightning).

Each process keeps its share of every weight, of its gradient and of what the optimizer knows of it,
and gets the whole of a block from the others just before it computes with it (Zhao et al. 2023,
arXiv 2304.11277; per parameter: ``torch.distributed.fsdp.fully_shard``).
"""

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from vissl_lite.errors import UserError
from vissl_lite.training.sync_batchnorm import SyncBatchNorm

FSDP = "fsdp"

Module = TypeVar("Module", bound=nn.Module)

# What Lightning can do with a network in parts.
SHARDED_PRECISIONS = ("auto", "32-true", "bf16-mixed", "bf16-true", "16-true")


def sharded_strategy(processes: int) -> ModelParallelStrategy:
    """Lightning's strategy for one network over all processes, with single-file checkpoints.

    Args:
        processes: How many there are, on all machines.
    """
    return ModelParallelStrategy(
        data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False
    )


def check_sharding(precision: str, compile: bool) -> None:
    """Raise a UserError for settings that sharding does not support."""
    if precision not in SHARDED_PRECISIONS:
        raise UserError(
            f"--strategy {FSDP} works with --precision {', '.join(SHARDED_PRECISIONS)}, not with "
            f"{precision}"
        )
    if compile:
        raise UserError(
            f"--compile and --strategy {FSDP} do not go together: leave one of them out"
        )


def shard_module(module: pl.LightningModule, mesh: DeviceMesh) -> None:
    """Shard the weights of a module over all processes.

    Blocks that a network repeats are gathered one at a time, all other weights together for the
    whole of ``training_step``, whatever that does with them. Buffers stay whole. BatchNorm is
    synchronized first.

    Args:
        module: Module with its weights; its ``training_step`` is the only way to compute with it
            then.
        mesh: The processes, as ``sharded_strategy`` arranges them.
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
    """Repeated blocks of a network, innermost first: items of lists of at least two of a kind."""
    for child in module.children():
        yield from repeated_blocks(child)
    if isinstance(module, (nn.Sequential, nn.ModuleList)):
        kinds = {type(child) for child in module}
        if len(module) > 1 and len(kinds) == 1:
            yield from (child for child in module if any(True for _ in child.children()))


def is_sharded(module: nn.Module) -> bool:
    """Whether ``shard_module`` has been applied."""
    return isinstance(module, FSDPModule)


def mark_sharding(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Record in a checkpoint whether the network is sharded; see ``check_same_sharding``."""
    checkpoint["sharded"] = is_sharded(module)


def check_same_sharding(checkpoint: dict[str, Any], sharded: bool) -> None:
    """Raise a UserError if a checkpoint is sharded and the training is not, or vice versa.

    The optimizer's states of a network in parts stand in another order.
    """
    before = checkpoint.get("sharded", False)
    if before != sharded:
        raise UserError(
            f"the run was trained {'with' if before else 'without'} --strategy {FSDP}: resume "
            f"it like that"
        )


class UnshardedCopy:
    """A copy of a module with all of its weights, on the CPU of the main process."""

    def __init__(self) -> None:
        self.copy: Any = None

    def keep(self, module: pl.LightningModule) -> None:
        """Copy a module before it is sharded."""
        if module.global_rank == 0:
            # the processes themselves can't be copied
            self.copy = copy.deepcopy(module, {id(module.device_mesh): module.device_mesh})

    def of(self, module: Module) -> Module:
        """The module with its current weights. All processes have to call it.

        Args:
            module: As given to ``keep``, cut by ``shard_module`` or not.

        Returns:
            The copy, with the weights and buffers of the module. The module itself if it is not
            cut, and in all processes but the main one.
        """
        if not is_sharded(module):
            return module
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(module, options=options)  # empty but in the main process
        if self.copy is None:
            return module
        self.copy.load_state_dict(state)
        whole: Module = self.copy
        return whole
