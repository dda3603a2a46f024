"""Data workers: processes that load images for the training process."""

import gc
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Generic, TypeVar

import cv2
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from vissl_lite.data.reading import (
    limit_pixels,
    max_pixels,
    silence_decoders,
    slice_along,
    slice_axis,
)
from vissl_lite.data.worker_log import WorkerLog
from vissl_lite.errors import UserError
from vissl_lite.faults import worker_ended

log = logging.getLogger(__name__)

T = TypeVar("T")

# What a whole group of processes gets: by Ctrl-C, systemd, SLURM, timeout.
_FOR_THE_GROUP = frozenset({signal.SIGINT, signal.SIGTERM})


class WorkerLoader(Generic[T]):
    """A ``DataLoader`` whose workers leave signals and a full ``/dev/shm`` to the main process.

    - Workers ignore SIGINT and SIGTERM but from the process that started them: when a whole group
      of processes is told to stop, the main process still needs its batches to save what it has.
    - What workers log, the main process logs: it has the log and the progress bar.
    - Batches come through shared memory; where that is full, as with Docker's 64 MB, through a
      pipe. (Left to PyTorch, a batch that finds no room is lost, and is waited for without end.)

    Args:
        dataset: The images.
        collate: Makes a batch of items, or of what the dataset gives.
        workers: Number of data workers; 0 loads in the main process.
        options: Options of ``DataLoader``.

    Attributes:
        waiting: Whether the main process is waiting for a batch just now.
    """

    def __init__(
        self,
        dataset: "Dataset[Any]",
        collate: Callable[[Any], T],
        workers: int,
        **options: Any,
    ) -> None:
        self.loader: DataLoader[Any] = DataLoader(
            dataset,
            num_workers=workers,
            collate_fn=_Sender(collate),
            worker_init_fn=(
                partial(start_worker, most=max_pixels(), axis=slice_axis(), lines=WorkerLog())
                if workers
                else None
            ),
            **options,
        )
        self.waiting = False
        self._said = False

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[T]:
        with _signals_held_back():  # a new worker inherits that, until it can ignore them itself
            batches = iter(self.loader)
        return self._received(batches)

    def _received(self, batches: Iterator[Any]) -> Iterator[T]:
        while True:
            self.waiting = True
            try:
                batch = next(batches)
            except StopIteration:
                return
            except UserError as error:
                raise type(error)(_without_traceback(str(error))) from None
            except (ConnectionError, EOFError) as error:  # It ended while it sent a batch.
                raise worker_ended() from error
            finally:
                self.waiting = False
            if isinstance(batch, _Piped):
                self._say(batch.why)
                batch = pickle.loads(batch.content)
            yield batch

    def _say(self, why: str) -> None:
        if not self._said:
            self._said = True
            log.warning(
                "There is too little shared memory for the batches of the data workers: they come "
                "through pipes instead, which is slower (%s). Enlarge /dev/shm, as with docker run "
                "--shm-size 8g, or give fewer --num_workers or a smaller --batch_size.",
                why,
                extra={"code": "memory.shared"},
            )


def _without_traceback(text: str) -> str:
    """The message of an error from a worker, without the traceback that PyTorch prepends."""
    if not text.startswith("Caught "):
        return text
    return text.strip().splitlines()[-1].split("Error: ", 1)[-1]


class _Piped:
    """A batch that did not fit into shared memory.

    Args:
        content: The pickled batch.
        why: Reason.
    """

    def __init__(self, content: bytes, why: str) -> None:
        self.content, self.why = content, why


class _Sender:
    """Collate a batch and move it to shared memory, or pickle it if there is no room.

    Args:
        collate: Makes the batch.
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, items: Any) -> Any:
        batch = self.collate(items)
        if get_worker_info() is None:
            return batch
        try:
            for tensor in _tensors(batch):
                tensor.share_memory_()
        except RuntimeError as error:
            if "shared memory" not in str(error):
                raise
            return _Piped(pickle.dumps(batch, protocol=5), str(error))
        return batch


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield all non-empty tensors of nested lists and tuples."""
    if isinstance(value, Tensor):
        if value.numel():
            yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def start_worker(worker: int, most: int, axis: int | None, lines: WorkerLog) -> None:
    """Initialize a data worker: one OpenCV thread, signals left to the main process.

    (A lower priority made training slower.)

    Args:
        worker: Number of the worker.
        most: Pixels that an image may have, of which a worker that is started anew knows nothing.
        axis: Axis of the slices of volumes, which it does not know either; see ``slice_along``.
        lines: Takes what it logs.
    """
    lines.attach()
    limit_pixels(most)
    slice_along(axis)
    silence_decoders()
    sys.excepthook = _report
    cv2.setNumThreads(0)
    # Collecting garbage writes to every object that it looks at, and so would copy all of those
    # that this process shares with the one that forked it.
    gc.freeze()
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_GROUP)
        parent = multiprocessing.parent_process()
        threading.Thread(target=_obey, args=(parent and parent.pid,), daemon=True).start()


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print errors outside of the reading of images, unless the main process has ended."""
    if not isinstance(error, EOFError | ConnectionError):  # the main process has gone
        sys.__excepthook__(kind, error, trace)


def _obey(parent: int | None) -> None:
    """Wait for signals and exit if the parent sends one."""
    while True:
        if signal.sigwaitinfo(_FOR_THE_GROUP).si_pid == parent:
            os._exit(0)


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Block signals to the process group within a block."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_GROUP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
