"""BatchNorm over the batches of all processes, also on CPUs, which torch does not support."""

import torch
from lightning.pytorch.plugins import LayerSync
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vissl_lite.training.processes import gather, world


class Synchronized(_BatchNorm):
    """BatchNorm with the mean and variance of the batches of all processes.

    What ``torch.nn.SyncBatchNorm`` does on GPUs, out of ordinary operations. Running statistics
    are updated as by BatchNorm on the joined batch, and are the same in all processes.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world()[1] == 1:
            return super().forward(x)
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        places = [0, *range(2, x.ndim)]
        variance, mean = torch.var_mean(values, places, correction=0)
        count = values.new_tensor([values.numel() / values.shape[1]])
        # each process's statistics, which give those of all without the loss of digits that a sum
        # of squares would bring (Chan, Golub & LeVeque 1983, "Algorithms for Computing the Sample
        # Variance", eq. 2.1)
        means, variances, counts = gather(torch.cat([mean, variance, count])[None]).split(
            [len(mean), len(mean), 1], dim=1
        )
        shares = counts / counts.sum()
        mean = (shares * means).sum(dim=0)
        variance = (shares * (variances + (means - mean).square())).sum(dim=0)
        self._update(mean.detach(), variance.detach(), counts.sum())
        scale = (variance + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        shape = (-1, *[1] * (x.ndim - 2))
        normed = (values - mean.view(shape)) * scale.view(shape)
        if self.bias is not None:
            normed = normed + self.bias.view(shape)
        return normed.to(x.dtype)

    @torch.no_grad()
    def _update(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        new = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, new)
        self.running_var.lerp_(variance * count / (count - 1), new)


class _Synchronized1d(Synchronized, nn.BatchNorm1d):
    pass


class _Synchronized2d(Synchronized, nn.BatchNorm2d):
    pass


class _SynchronizedAct2d(Synchronized, BatchNormAct2d):
    """As above, with the activation of timm's BatchNormAct2d."""

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = super().forward(x)
        if self.training and world()[1] > 1:  # else it has been through BatchNormAct2d
            normed = self.act(self.drop(normed))  # type: ignore[operator]
        return normed


# A module is turned by changing its class alone: its parameters, their names and its activation
# stay what they are, for the optimizer and for checkpoints.
_TURNED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: _Synchronized1d,
    nn.BatchNorm2d: _Synchronized2d,
    BatchNormAct2d: _SynchronizedAct2d,
}
_BACK = {turned: plain for plain, turned in _TURNED.items()}


def _turn(model: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> nn.Module:
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))
    return model


class SyncBatchNorm(LayerSync):
    """Lightning plugin that synchronizes BatchNorm if there are several processes.

    On GPUs by timm's conversion: torch's own drops what timm adds to its norms.
    """

    def apply(self, model: nn.Module) -> nn.Module:
        if torch.cuda.is_available():
            return convert_sync_batchnorm(model)
        return _turn(model, _TURNED)

    def revert(self, model: nn.Module) -> nn.Module:
        return _turn(model, _BACK)  # timm's are ordinary BatchNorms in evaluation
