"""Inference over many images."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from vissl_lite.data.image_reader import PHOTOGRAPHS, ImageReader
from vissl_lite.data.images import BROKEN_IMAGE, resize_and_crop
from vissl_lite.data.reading import Broken, reason, report_skipped
from vissl_lite.data.workers import WorkerLoader
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import DivergedError, UserError
from vissl_lite.training.cpu.operators import fast_cpu_operators
from vissl_lite.training.hardware import cpu_gains_from_bf16

log = logging.getLogger(__name__)


class CenterCroppedImages(Dataset[Tensor | str]):
    """Images as they are evaluated: shorter side resized, center cropped; the reason if unreadable.

    Args:
        paths: Image files.
        size: Side in pixels.
        reader: How they are read.
    """

    def __init__(self, paths: Sequence[str], size: int, reader: ImageReader = PHOTOGRAPHS) -> None:
        self.paths, self.size, self.reader = paths, size, reader

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            image = resize_and_crop(self.reader.read(self.paths[index], self.size), self.size)
        except BROKEN_IMAGE as error:
            return reason(error, self.paths[index])
        return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)


def _collate(items: Sequence[Tensor | str]) -> tuple[Tensor | None, list[str | None]]:
    good = [item for item in items if isinstance(item, Tensor)]
    faults = [item if isinstance(item, str) else None for item in items]
    return (torch.stack(good) if good else None), faults


def predict_images(
    model: nn.Module,
    compute: Callable[[Tensor], list[Tensor]],
    encoder: Encoder,
    paths: Sequence[str],
    progress: Callable[[int], None] | None = None,
    batch_size: int = 128,
) -> tuple[list[Tensor], np.ndarray]:
    """Compute outputs for every image, in evaluation mode and without gradients.

    Args:
        model: Put on the accelerator if there is one, and back where it was afterwards.
        compute: Function from a normalized ``(B, C, H, W)`` batch to tensors ``(B, ...)``.
        encoder: Encoder of the model, which tells how images are read and normalized.
        paths: Image files. Broken ones are left out, and named in the log.
        progress: Called with the number of images done since the last call.
        batch_size: Images at a time.

    Returns:
        The tensors joined over all images, float32 on the CPU, and ``(N,)`` bool: which images
        they stand for.

    Raises:
        UserError: No image can be read.
    """
    outputs: list[list[Tensor]] = []
    good = run_in_batches(
        model,
        compute,
        encoder,
        paths,
        lambda some, found: outputs.append(found),
        progress,
        batch_size,
    )
    return [torch.cat(parts) for parts in zip(*outputs, strict=True)], good


def run_in_batches(
    model: nn.Module,
    compute: Callable[[Tensor], list[Tensor]],
    encoder: Encoder,
    paths: Sequence[str],
    use: Callable[[list[str], list[Tensor]], None],
    progress: Callable[[int], None] | None = None,
    batch_size: int = 128,
) -> np.ndarray:
    """Like ``predict_images``, but each batch of outputs is consumed at once.

    Args:
        model: See ``predict_images``, as for the others.
        compute: Function from a batch to tensors.
        encoder: Encoder of the model.
        paths: Image files.
        use: Called with the paths of the images of a batch that can be read and their tensors,
            float32 on the CPU.
        progress: Called with the number of images done since the last call.
        batch_size: Images at a time.

    Returns:
        ``(N,)`` bool: which images can be read.

    Raises:
        UserError: No image can be read.
    """
    loader = WorkerLoader(
        CenterCroppedImages(paths, encoder.image_size, encoder.reader),
        _collate,
        # a worker costs a tenth of a second to start, and few images are read as fast here
        0 if len(paths) < 512 else (8 if torch.cuda.is_available() else 1),
        batch_size=batch_size,
    )
    faults: list[str | None] = []
    with inference_mode(model) as device:
        for images, found in loader:
            if images is not None:
                read = [paths[len(faults) + i] for i, fault in enumerate(found) if fault is None]
                images = images.to(device, memory_format=torch.channels_last)
                use(read, [o.float().cpu() for o in compute(encoder.normalize(images))])
            faults += found
            if progress is not None:
                progress(len(found))
    return report_broken(paths, faults)


def check_outputs(outputs: Iterable[Tensor | np.ndarray], place: str) -> None:
    """Raise a DivergedError for outputs that are not finite numbers.

    All images are refused with the one that shows it: a model whose sums overflow on one image is
    not to be trusted on others.

    Args:
        outputs: Outputs of a model, whose weights are finite.
        place: Description of the images, for messages.
    """
    if not all(torch.as_tensor(one).isfinite().all() for one in outputs):
        raise DivergedError(
            f"the outputs for {place} are not finite numbers: the training of the model has "
            f"diverged, or its weights or the mean and std in its config.json are damaged"
        )


@contextmanager
def inference_mode(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients, in bf16 if that is faster on this CPU.

    Args:
        model: Its own type is used if that is not float32, as with ``--precision 64-true``. Put on
            the accelerator if there is one, and back where it was afterwards.

    Yields:
        The device.
    """
    place = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]  # parents before children
    device = torch.device("cuda") if torch.cuda.is_available() else place
    model.to(device).eval()
    bf16 = device.type == "cuda" or cpu_gains_from_bf16()
    single = all(one.dtype == torch.float32 for one in model.parameters())
    try:
        half = torch.autocast(device.type, torch.bfloat16, enabled=bf16 and single)
        with torch.inference_mode(), half, fast_cpu_operators():
            yield device
    finally:
        for module, training in modes:
            module.train(training)  # frozen norms stay frozen
        model.to(place)


def report_broken(paths: Sequence[str], faults: Sequence[str | None]) -> np.ndarray:
    """Log the images that could not be read.

    Args:
        paths: N image files.
        faults: Why each of them can't be read; None where it could.

    Returns:
        ``(N,)`` bool: which of them could be read.

    Raises:
        UserError: None could.
    """
    broken = [Broken(p, why) for p, why in zip(paths, faults, strict=True) if why is not None]
    if len(broken) == len(paths):
        first = broken[0]
        raise UserError(
            f"none of {len(paths)} images can be read, the first {first.path} ({first.why})"
        )
    report_skipped(broken)
    return np.array([why is None for why in faults])
