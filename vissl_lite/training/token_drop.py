"""Token drop: a ViT that sees a random part of the patches of a view during most of a training.

FLIP (Li et al. 2022, arXiv 2212.00794) trains on a half or a quarter of the patches; the half was
the more accurate.
"""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from timm.layers import PatchDropout
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vissl_lite.data.stream import Batch
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.training.schedule import Schedule

# Of the 64 patches of a small image nine tenths leave six.
MAX_SHARE = 0.9

# When half as many tokens are dropped, and when none, as shares of the run. Evaluation and
# fine-tuning see all tokens, so training ends with all, as FLIP's does ("unmasked tuning"). Few
# numbers of tokens: compilers look for the best kernels for each of them anew.
HALF_START, END = 0.8, 0.9


def dropped_at(progress: float, share: float) -> float:
    """Share of the patch tokens of a view that is dropped at a fraction of the run.

    Args:
        progress: Share of the run that is done, in [0, 1].
        share: Share that is dropped at first, in [0, 1).
    """
    if progress >= END:
        return 0.0
    return share / 2 if progress >= HALF_START else share


class TokenDrop(Callback):
    """Drop random patch tokens of the views that the encoder is trained on.

    The encoder's timm model gets a ``PatchDropout`` before its first block: after the position
    embedding, so that a patch keeps its place. Class and register tokens stay. Patches are drawn
    for each view of each image from torch's generator, which ``Schedule`` seeds. Views smaller
    than the largest (local crops) keep all tokens, as in the code of MSN (Assran et al. 2022, arXiv
    2204.07141), and so do the teachers' views. At the end of the training the model is as it was.
    The share is logged as ``token_drop``.

    Args:
        schedule: Schedule of the run.
        encoder: Encoder to train, with a timm ``VisionTransformer``.
        share: Share of the patch tokens that is dropped at first; see ``dropped_at``.
    """

    def __init__(self, schedule: Schedule, encoder: Encoder, share: float) -> None:
        self.schedule, self.encoder, self.share = schedule, encoder, share
        self._dropout = PatchDropout(0.0, encoder.model.num_prefix_tokens)
        self._now = 0.0
        self._largest_side = 0
        self._hook: RemovableHandle | None = None

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.encoder.model.patch_drop = self._dropout
        self._hook = self.encoder.register_forward_pre_hook(self._set_share)

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        whole = self.schedule.batches == 0 and self.schedule.tries_memory
        self._now = 0.0 if whole else dropped_at(self.schedule.fraction, self.share)
        self._largest_side = max(view.shape[-1] for view in batch.views)
        module.log("token_drop", self._now)

    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._restore()

    def on_exception(
        self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._restore()  # the batch size that fits into memory is looked for with all patches

    def _restore(self) -> None:
        self.encoder.model.patch_drop = nn.Identity()
        if self._hook is not None:
            self._hook.remove()

    def _set_share(self, encoder: nn.Module, inputs: tuple[Tensor]) -> None:
        is_large = inputs[0].shape[-1] == self._largest_side
        self._dropout.prob = self._now if is_large else 0.0
