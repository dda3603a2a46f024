"""Memory: the peak so far, and a batch size that fits after running out of it."""

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device

from vissl_lite.data.stream import Source, collate
from vissl_lite.errors import OutOfMemoryError, UserError


def peak_memory(device: torch.device) -> int | None:
    """Peak memory of this process so far in bytes.

    Args:
        device: Device of the training. Of CUDA it is the GPU memory that PyTorch has reserved,
            otherwise the resident set of the process, without its data workers.

    Returns:
        None where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    with suppress(OSError):  # There is no such file outside Linux.
        known = re.search(
            r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE
        )
        if known is not None:
            return 1024 * int(known[1])
    return None


def out_of_memory(
    module: pl.LightningModule,
    trainer: pl.Trainer,
    dataset: Source,
    batch_size: int,
    accumulate: int,
) -> UserError:
    """The error for a batch that did not fit, naming a size that does by trial.

    With several processes it names none: a trial would wait for the others, which may have room.

    Args:
        module: Module whose ``training_step`` ran out of memory.
        trainer: Trainer that it ran in.
        dataset: Training images.
        batch_size: Batch size that did not fit, over all devices.
        accumulate: Batches an optimizer step.
    """
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "this machine"
    if trainer.world_size > 1:
        return UserError(
            f"--batch_size {batch_size} does not fit into the memory of {where}: give a smaller "
            f"one, with --accumulate_grad_batches, or more devices"
        )
    trainer.strategy.model_to_device()  # Lightning has moved it to the CPU
    module.trainer = None  # a trial is not logged
    item = dataset.first()

    def try_out(size: int) -> None:
        batch = move_data_to_device(collate([item] * size), module.device)
        with trainer.precision_plugin.forward_context():
            loss = module.training_step(batch, 0)
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        # an optimizer such as Adam keeps two more of each parameter
        _ = [torch.empty_like(p) for p in module.parameters() if p.requires_grad for _ in range(2)]

    def clean() -> None:
        module.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    devices = trainer.world_size
    fits = devices * largest_that_fits(try_out, clean, batch_size // devices)
    if not fits:
        return OutOfMemoryError(
            f"not even two images fit into the memory of {where}: give a smaller --image_size or "
            f"another backbone"
        )
    times = -(-batch_size * accumulate // fits)
    keeps = ""
    if hasattr(module, "batches_per_step"):  # a pretext; fine-tuning does not accumulate
        more = f"--batch_size {fits} --accumulate_grad_batches {times}"
        keeps = f" ({more} keeps the optimizer's batch)"
    return OutOfMemoryError(
        f"--batch_size {batch_size} does not fit into the memory of {where}; {fits} would{keeps}"
    )


def largest_that_fits(
    try_out: Callable[[int], None], clean: Callable[[], None], too_large: int
) -> int:
    """Halve the batch size until a batch fits.

    Args:
        try_out: Takes a size; raises a ``RuntimeError``, of which ``torch.OutOfMemoryError`` is
            one, or a ``MemoryError`` if that does not fit.
        clean: Called after each trial.
        too_large: A size that does not fit.

    Returns:
        The largest size tried that fits; 0 if not even 2 does.
    """
    size = too_large // 2
    while size >= 2:
        failed = False
        try:
            try_out(size)
        except (RuntimeError, MemoryError):  # a CPU's operators have many words for it
            failed = True  # cleaned up below, once the exception has let go of its tensors
        clean()
        if not failed:
            return size
        size //= 2
    return 0
