"""Several processes through gloo: the same weights as one, after lost processes and signals too."""

import faulthandler
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vissl_lite import cli
from vissl_lite.data.images import find_images
from vissl_lite.data.stream import ViewDataset
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.errors import UserError
from vissl_lite.optim import OptimizerSettings
from vissl_lite.pretext import dinov2, mae, pretext_class
from vissl_lite.training.checkpoints import read_checkpoint
from vissl_lite.training.fit import fit
from vissl_lite.training.freezing import FrozenParts, train_only
from vissl_lite.training.hardware import Hardware
from vissl_lite.training.processes import world
from vissl_lite.training.schedule import Schedule
from vissl_lite.training.stream import StreamData
from vissl_lite.training.sync_batchnorm import SyncBatchNorm, Synchronized

STEPS = 20

# Seconds after which a process is taken to wait for another one in vain.
STUCK = 300

# SimCLR on the last blocks of an encoder that is frozen at first, with a moving average of it.
ADAPTED = "simclr, adapted"

# A contrastive, a momentum, a clustering, a masked and a self-distilling pretext, one with a row of
# weights for each image, one with a frozen teacher, one with low-rank adapters, and one that is
# adapted, each with a learning rate at which the loss falls: beyond, rounding errors double from
# step to step. The queues fill up, and SwAV's takes part, within the 20 steps.
PRETEXTS = {
    "simclr": ("test_resnet", "all", 2e-4, {"temperature": 0.5}),
    ADAPTED: ("test_resnet", "blocks:2", 2e-4, {"temperature": 0.5}),
    "moco": ("test_resnet", "all", 1e-3, {"queue_size": 32}),
    "swav": ("test_resnet", "all", 1e-4, {"queue_size": 32, "prototypes": 16, "hidden_size": 64}),
    "mae": ("test_vit", "all", 0.1, {}),
    # KoLeo looks at the images of a process, as in the authors' code; stochastic depth is random
    "dinov2": (
        "test_vit",
        "all",
        1e-3,
        {"prototypes": 16, "hidden_size": 64, "koleo_weight": 0.0, "drop_path": 0.0},
    ),
    "diet": ("test_resnet", "all", 1e-3, {}),
    "distillation": (  # mixup is random
        "test_resnet",
        "all",
        1e-3,
        {"teacher": "random:test_vit", "queue_size": 32, "mixup": False, "map_weight": 1.0},
    ),
    "moco_v3": ("test_vit", "lora:4", 1e-3, {}),
}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def shared_mask(
    count: int, patches: int, ratio: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """This process's rows of a mask that is drawn for the whole batch."""
    rank, processes = world()
    step = torch.Generator().manual_seed(shared_mask.drawn)
    shared_mask.drawn += 1
    order = torch.rand(count * processes, patches, generator=step).argsort(dim=1)
    own = order[rank * count : (rank + 1) * count]
    masked = max(1, round(ratio * patches))
    return own[:, masked:], own[:, :masked]


def shared_blocks(count: int, rows: int, columns: int) -> torch.Tensor:
    """This process's rows of masks that are drawn for two views of the whole batch."""
    rank, processes = world()
    step = torch.Generator().manual_seed(shared_mask.drawn)
    shared_mask.drawn += 1
    size = (2, processes, count // 2, rows, columns)
    return (torch.rand(size, generator=step) < 0.3)[:, rank].reshape(count, rows, columns)


Tensors = dict[str, torch.Tensor]


def train(
    name: str, photos: Path, processes: int, strategy: str = "auto"
) -> tuple[Tensors, Tensors]:
    """How far 20 steps on batches of 8 images move a pretext's weights; the buffers after them."""
    torch.manual_seed(0)
    backbone, parts, lr, options = PRETEXTS[name]
    encoder = build_encoder(backbone, 32)
    train_only(encoder, parts)
    task = pretext_class(name.split(",")[0])(encoder, **options)
    # Adam makes steps of one size out of gradients that are rounding errors
    task.optimizer_settings = OptimizerSettings("sgd", lr=lr, weight_decay=1e-4)
    schedule = Schedule(lr, 0.1, seed=0, batches=STEPS, freeze_share=0.2 * (name == ADAPTED))
    callbacks = []
    if name == ADAPTED:
        task.average_encoder(0.9)
        callbacks.append(FrozenParts(schedule, encoder))
    dataset = ViewDataset(find_images([photos]), task.views(), seed=0)
    task.prepare(dataset, photos)
    data = StreamData(dataset, 8, None, schedule, workers=0)
    data.epochs = -(-STEPS // data.batches_per_epoch)
    schedule.total = data.epochs * data.batches_per_epoch
    shared_mask.drawn = 0
    before = {key: weight.detach().clone() for key, weight in task.named_parameters()}
    hardware = Hardware("32-true", processes, strategy=strategy, num_workers=0)
    fit(task, data, schedule, hardware, callbacks)
    if strategy == "fsdp":
        task = task.unsharded()
        if task.global_rank > 0:  # what it has are parts
            return {}, {}
    moves = {key: weight.detach() - before[key] for key, weight in task.named_parameters()}
    return moves, dict(task.named_buffers())


# A server that has imported everything forks the processes: starting each anew takes far longer.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["vissl_lite.commands.pretrain", "test_distributed"])


def place(rank: int, processes: int, port: int) -> dict[str, str]:
    """What torchrun tells a process of a single machine, and Lightning reads."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
    return {name: str(v) for name, v in told.items()} | {"MASTER_ADDR": "127.0.0.1"}


def one_of(rank: int, processes: int, strategy: str, port: int, photos: Path, out: Path) -> None:
    """One of the processes."""
    os.environ.update(place(rank, processes, port))
    torch.set_num_threads(1)
    stacks = (out / f"{rank}.stacks").open("w")
    faulthandler.dump_traceback_later(STUCK, file=stacks)
    mae.random_mask, dinov2.draw_masks = shared_mask, shared_blocks
    states = {name: train(name, photos, processes, strategy) for name in PRETEXTS}
    if strategy != "fsdp" or rank == 0:
        torch.save(states, out / f"{processes}-{rank}.pt")
    faulthandler.cancel_dump_traceback_later()


def together(
    processes: int, strategy: str, photos: Path, out: Path
) -> list[dict[str, tuple[Tensors, Tensors]]]:
    """What each of several processes that has a whole network holds after training together."""
    port = free_port()
    started = [
        SERVER.Process(target=one_of, args=(rank, processes, strategy, port, photos, out))
        for rank in range(processes)
    ]
    try:
        for process in started:
            process.start()
        for process in started:
            process.join(STUCK + 10)
            stacks = [file.read_text() for file in sorted(out.glob("*.stacks"))]
            assert process.exitcode == 0, "\n".join(stacks)
    finally:
        for process in started:
            process.kill()
    return [torch.load(file) for file in out.glob("*.pt")]


@pytest.fixture(scope="module")
def alone(photos: Path) -> dict[str, tuple[Tensors, Tensors]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mae, "random_mask", shared_mask)
        patch.setattr(dinov2, "draw_masks", shared_blocks)
        return {name: train(name, photos, 1) for name in PRETEXTS}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "strategy"),
    [(2, "ddp"), (2, "fsdp")],
)
def test_several_processes_train_what_one_does(
    processes: int,
    strategy: str,
    alone: dict[str, tuple[Tensors, Tensors]],
    photos: Path,
    tmp_path: Path,
) -> None:
    """Weights, running statistics, queues and teachers are those of one process at equal batch.

    But for what a loss draws by chance, such as MAE's masks: each process draws for its own images,
    from a seed of its own, and so N processes draw others than one. The test therefore hands each
    process its rows of the mask that one process would have drawn.

    Weights differ by about a millionth as a rule. Where rounding carries a single activation over
    the edge of a ReLU it is more, hence a twentieth of the way that they have come; a gradient of
    another scale, or a norm of another batch, is off by about the whole way.
    """
    held = together(processes, strategy, photos, tmp_path)
    assert len(held) == (1 if strategy == "fsdp" else processes)
    for states in held:
        for name, (moves, buffers) in alone.items():
            same, other = torch.cat([m.flatten() for m in moves.values()]), states[name][0]
            off = torch.cat([other[key].flatten() for key in moves]) - same
            assert off.norm() < 0.05 * same.norm(), name
            assert buffers.keys() == states[name][1].keys()
            for key, value in buffers.items():
                torch.testing.assert_close(
                    states[name][1][key], value, atol=0.01, rtol=0.01, msg=f"{name}: {key}"
                )


def test_batchnorms_are_synchronized_in_place_and_turned_back() -> None:
    """Parameters, their names and timm's activations stay; ``state_dict`` is that of before."""
    model = nn.Sequential(build_encoder("test_resnet", 32).model, nn.BatchNorm1d(64))
    kinds, state = [type(m) for m in model.modules()], model.state_dict(keep_vars=True)
    SyncBatchNorm().apply(model)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(norm, Synchronized) for norm in norms)
    turned = model.state_dict(keep_vars=True)
    assert turned.keys() == state.keys()
    assert all(turned[key] is value for key, value in state.items())
    assert [type(m) for m in SyncBatchNorm().revert(model).modules()] == kinds


def command(words: list[str], environment: dict[str, str], log: Path) -> None:
    """The command line in a process of its own."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.exit(cli.main(words))


def start(words: list[str], environments: list[dict[str, str]], log: Path) -> list[BaseProcess]:
    """Start the command line in each environment."""
    processes = [SERVER.Process(target=command, args=(words, one, log)) for one in environments]
    for process in processes:
        process.start()
    return processes


def wait_for(file: Path, process: BaseProcess) -> None:
    deadline = time.monotonic() + 120
    while not file.exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert file.exists()


def words_for(photos: Path, out: Path, epochs: int, *more: str) -> list[str]:
    words = ["pretrain", "--data", photos, "--out", out, "--epochs", epochs, *more]
    words += ["--backbone", "test_resnet", "--image_size", 32, "--batch_size", 8]
    words += ["--num_workers", 0, "--precision", "32-true", "--logger", "none"]
    return list(map(str, words))


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "epochs"), [("ddp", 15)])
def test_a_run_goes_on_after_one_of_its_processes_is_killed(
    strategy: str, epochs: int, photos: Path, tmp_path: Path
) -> None:
    """The other one stops; both started again, with --resume, end as if nothing had happened."""
    log, two = tmp_path / "log", ("--devices", "2", "--strategy", strategy)

    def both(out: Path, *more: str) -> list[BaseProcess]:
        port = free_port()
        words = words_for(photos, out, epochs, *two, *more)
        return start(words, [place(rank, 2, port) for rank in (0, 1)], log)

    killed = both(tmp_path / "killed", "--resume")  # there is none yet: it starts
    wait_for(tmp_path / "killed" / "checkpoints" / "last.ckpt", killed[0])
    os.kill(killed[1].pid, signal.SIGKILL)
    killed[0].join(60)
    assert killed[0].exitcode == 2
    assert "another process of this run has ended" in log.read_text()
    assert not (tmp_path / "killed" / "results.json").exists()
    for out in ("killed", "whole"):
        for process in both(tmp_path / out, "--resume"):
            process.join(120)
            assert process.exitcode == 0, log.read_text()
    assert json.loads((tmp_path / "killed" / "results.json").read_text())["steps"] == 3 * epochs
    one, other = (
        load_file(tmp_path / out / "encoder" / "model.safetensors") for out in ("killed", "whole")
    )
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_slurm_job_whose_time_is_up_goes_into_the_queue_again(
    number: signal.Signals, photos: Path, tmp_path: Path
) -> None:
    """SIGUSR1 saves, and asks for another start; SIGTERM, as by scancel, only saves."""
    tool, asked = tmp_path / "scontrol", tmp_path / "asked"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    tool.chmod(0o755)
    job = {"SLURM_NTASKS": 1, "SLURM_NTASKS_PER_NODE": 1, "SLURM_JOB_ID": 4711, "SLURM_PROCID": 0}
    job |= {"SLURM_LOCALID": 0, "SLURM_NODEID": 0, "SLURM_NNODES": 1, "SLURM_JOB_NAME": "train"}
    environment = {name: str(value) for name, value in job.items()}
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    out, log = tmp_path / "run", tmp_path / "log"
    last = out / "checkpoints" / "last.ckpt"
    [process] = start(words_for(photos, out, 2000, "--resume"), [environment], log)
    wait_for(last, process)
    early = read_checkpoint(last)["global_step"]
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number
    assert f"stopped by {number.name}" in (out / "log.txt").read_text()
    assert read_checkpoint(last)["global_step"] >= early
    assert not (out / "results.json").exists()
    if number == signal.SIGUSR1:
        assert asked.read_text() == "requeue 4711\n"
    else:
        assert not asked.exists()
    assert [file.name for file in Path.cwd().glob("hpc_ckpt*")] == []


@pytest.mark.slow
def test_two_machines_are_two_torchruns(photos: Path, tmp_path: Path) -> None:
    """Two agents on localhost meet by torchrun's rendezvous; devices are what torchrun says."""
    words = words_for(photos, tmp_path / "run", 1, "--num_nodes", "2", "--strategy", "ddp")
    port = free_port()
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
             "--nproc_per_node", "1", "--rdzv_backend", "c10d",
             "--rdzv_endpoint", f"localhost:{port}", "--rdzv_conf", f"is_host={host}",
             "-m", "vissl_lite", *words],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for host in (1, 0)
    ]  # fmt: skip
    try:
        said = [one.communicate(timeout=120)[0] for one in agents]
    finally:
        for one in agents:
            one.kill()
    assert [one.returncode for one in agents] == [0, 0], said
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 3


TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}
SLURM = {"SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "train"}


@pytest.mark.parametrize("environment", [TORCHRUN, SLURM, SLURM | {"SLURM_NTASKS_PER_NODE": "2"}])
def test_devices_are_those_that_processes_were_started_for(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    Hardware(num_nodes=2).check()
    Hardware(devices=2, num_nodes=2).check()
    assert Hardware(num_nodes=2).devices_here() == 2
    for wrong in (Hardware(), Hardware(devices=4), Hardware(devices=4, num_nodes=2)):
        with pytest.raises(UserError, match="give --devices 2 --num_nodes 2"):
            wrong.check()
