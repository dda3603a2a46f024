"""Devices, machines, strategy, precision and data workers of a training."""

import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy, StrategyRegistry
from torch import nn

from vissl_lite.errors import UserError, check_count, did_you_mean
from vissl_lite.slurm import under_slurm
from vissl_lite.training.compiling import check_compiler
from vissl_lite.training.sharding import FSDP, check_sharding, sharded_strategy

LARGEST_CLUSTER = 100_000  # Machines.

# Precisions, as Lightning names them.
PRECISIONS = (
    "auto",
    "32-true",
    "16-mixed",
    "bf16-mixed",
    "16-true",
    "bf16-true",
    "64-true",
    "transformer-engine",
    "transformer-engine-float16",
    "64",
    "32",
    "16",
    "bf16",
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hardware:
    """Hardware settings of a training, with Lightning's names and meanings.

    Attributes:
        precision: ``auto``, or a precision of Lightning such as ``32-true`` or ``bf16-mixed``.
        devices: Number of devices on each machine, or ``auto``.
        num_nodes: Number of machines.
        strategy: ``auto``, ``ddp``, ``fsdp`` (see ``sharding``), or another strategy of Lightning
            that keeps the whole network in each process.
        num_workers: Data workers per device; None chooses by the number of cores.
        compile: Whether to train encoders through ``torch.compile``; see ``compiling``.
    """

    precision: str = "auto"
    devices: int | str = "auto"
    num_nodes: int = 1
    strategy: str = "auto"
    num_workers: int | None = None
    compile: bool = False

    def check(self) -> None:
        """Raise a UserError, the same in all processes, if the settings cannot be used here."""
        if self.strategy.startswith("deepspeed") or (
            self.strategy.startswith("fsdp") and not self.sharded
        ):
            raise UserError(
                f"--strategy {self.strategy} is not supported: give --strategy fsdp for networks "
                f"that do not fit on one device, otherwise ddp"
            )
        _check_precision(self.precision)
        names = StrategyRegistry.available_strategies()
        # those that train in child processes leave nothing here for the results of a run
        children = ("fork", "spawn", "notebook")
        ddp = [name for name in names if name.startswith("ddp")]
        known = ["auto", FSDP, *(name for name in ddp if not any(one in name for one in children))]
        if self.strategy not in known:
            raise UserError(
                f"--strategy {self.strategy} is not known: {did_you_mean(self.strategy, known)}"
            )
        check_count("num_nodes", self.num_nodes, LARGEST_CLUSTER)
        _check_devices(self.devices)
        workers = max(32, 4 * _cores())
        if self.num_workers is not None and not 0 <= self.num_workers <= workers:
            raise UserError(
                f"--num_workers {self.num_workers} must be from 0 to {workers} on a machine of "
                f"{_cores()} cores"
            )
        if self.sharded:
            check_sharding(self.precision, self.compile)
        if self.compile:
            check_compiler()
        started = _started()
        if started is None:
            return
        by, devices, machines = started
        if self.devices not in ("auto", -1, "-1", devices, str(devices)) or (
            self.num_nodes != machines
        ):
            raise UserError(
                f"{by} started {devices} process(es) on each of {machines} machine(s), which "
                f"does not match --devices {self.devices} --num_nodes {self.num_nodes}: give "
                f"--devices {devices} --num_nodes {machines}"
            )

    @property
    def sharded(self) -> bool:
        """Whether each process holds only a part of the network."""
        return self.strategy == FSDP

    def devices_here(self) -> int | str:
        """Devices on this machine, in the form that Lightning takes."""
        if self.devices != "auto":
            return self.devices
        started = _started()
        if started is not None:
            return started[1]
        return "auto" if torch.cuda.is_available() else 1

    def one_process(self) -> bool:
        """Whether a single process trains."""
        return self.processes() == 1

    def processes(self) -> int:
        """Number of training processes on all machines."""
        devices = str(self.devices_here())
        if devices in ("auto", "-1"):
            here = torch.cuda.device_count()
        else:
            numbers = devices.split(",")
            here = len(numbers) if len(numbers) > 1 else int(devices)
        return self.num_nodes * here

    def lightning_strategy(self) -> Strategy | str:
        """The strategy of Lightning for these processes."""
        if self.sharded:
            return sharded_strategy(self.processes())
        if self.strategy == "auto" and self.one_process():
            return "auto"
        name = "ddp" if self.strategy == "auto" else self.strategy
        # Running statistics, queues and centers are computed from the batches of all processes and
        # equal in each, so they need not be sent at every step. A queue may be large.
        return DDPStrategy(**StrategyRegistry[name]["init_params"], broadcast_buffers=False)

    def workers(self) -> int:
        """Data workers for each device.

        One worker is enough for training on the CPU: it loads several hundred images per second,
        and more workers would take cores away from the training step.
        """
        if self.num_workers is not None:
            return self.num_workers
        if not torch.cuda.is_available():
            return 1
        return max(1, min(16, _cores() // max(1, torch.cuda.device_count())))


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise UserError(
            f"--precision {precision} is not known: {did_you_mean(precision, PRECISIONS)}"
        )
    if precision.startswith("transformer-engine") and not find_spec("transformer_engine"):
        raise UserError(
            f"--precision {precision} needs a package that is missing: pip install "
            f"transformer_engine"
        )


def _check_devices(devices: int | str) -> None:
    """Raise a UserError if this is neither a number of devices of this machine nor a list."""
    if devices == "auto":
        return
    gpus = torch.cuda.device_count()
    there, kind = (gpus, "GPU(s)") if gpus else (max(32, _cores()), "processes on the CPU")
    if gpus and str(devices) == "-1":  # All of them.
        return
    numbers = str(devices).split(",") if gpus else [str(devices)]
    good = all(re.fullmatch("[0-9]{1,9}", number.strip()) for number in numbers)
    most = there if len(numbers) == 1 else there - 1
    if not good or max(map(int, numbers)) > most or (len(numbers) == 1 and int(devices) < 1):
        raise UserError(f"--devices {devices} must be auto or from 1 to {there} {kind}")


def check_batch_size(batch_size: int | None, processes: int) -> None:
    """Raise a UserError if a given batch size is not a multiple of the number of processes."""
    if batch_size is not None and batch_size % processes:
        raise UserError(
            f"--batch_size {batch_size} can't be divided by {processes} devices: give a multiple "
            f"of {processes}"
        )


def _started() -> tuple[str, int, int] | None:
    """The launcher of this process: its name, processes per machine, machines; None for none."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        return "torchrun", here, int(os.environ["WORLD_SIZE"]) // here
    if under_slurm():
        machines = int(os.environ.get("SLURM_NNODES", 1))
        tasks = os.environ.get("SLURM_NTASKS_PER_NODE")
        here = int(tasks) if tasks else int(os.environ["SLURM_NTASKS"]) // machines
        return "SLURM", here, machines
    return None


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose_precision(precision: str, model: nn.Module) -> str:
    """Choose the precision for ``auto``: bf16 if it is faster.

    On CPUs that multiply bf16 matrices faster than float32 ones, it is faster for ordinary
    convolutions and transformers (ResNet-18 at 224 pixels: 2.0 times as fast as float32), but not
    for depthwise convolutions (MobileNet, EfficientNet, ConvNeXt).
    """
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        # Some older GPUs emulate bf16, which is slow.
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16-mixed" if native else "16-mixed"
    depthwise = any(
        isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1 for m in model.modules()
    )
    return "bf16-mixed" if not depthwise and cpu_gains_from_bf16() else "32-true"


@contextmanager
def tf32() -> Iterator[None]:
    """Multiply float32 matrices as TF32 (10 bits of mantissa instead of 23) on GPUs.

    In training this loses nothing: the losses multiply features that come from a network in bf16 (7
    bits), and sums stay in float32. With ``--precision 32-true`` it makes a step several times as
    fast; torch does the same for cuDNN's convolutions by default. Outside of training, where
    features are compared and probes are fitted, float32 stays exact.
    """
    before = torch.get_float32_matmul_precision()
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
        log.debug("float32 matrices are multiplied as TF32 while training, and exactly elsewhere")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@cache
def cpu_gains_from_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware, and faster than float32 ones.

    AMX, and AVX512-BF16 on AMD processors, are about twice as fast as float32 or more. Intel
    processors with AVX512-BF16 alone, as in virtual machines without AMX, take up to twice the time
    instead. So products of both kinds are timed, once per process (tens of milliseconds).
    """
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
    except (AttributeError, RuntimeError):  # Torch was built without oneDNN.
        return False
    return _product_seconds(torch.bfloat16) < _product_seconds(torch.float32)


@torch.no_grad()
def _product_seconds(dtype: torch.dtype) -> float:
    """Shortest of a few times that the CPU takes for a product of ``(512, 512)`` matrices."""
    factor, times = torch.ones(512, 512, dtype=dtype, device="cpu"), []
    with torch.autocast("cpu", enabled=False):
        factor @ factor  # The first product compiles a kernel
        for _ in range(7):
            started = time.perf_counter()
            factor @ factor
            times.append(time.perf_counter() - started)
    return min(times)
