"""Batch norm over the samples of all processes, on any device and wherever a batch's statistics are used."""

import torch
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from torch import Tensor, nn


class SyncBatchNorm(TorchSyncBatchNorm):
    """What trainer.sync_batchnorm means in this project.

    torch.nn.SyncBatchNorm trains on GPUs only and never synchronises in evaluation mode, in which MADM's
    teacher normalises by the statistics of its batch.
    """

    def apply(self, model: nn.Module) -> nn.Module:
        """Let each batch norm of a model work so, in place."""
        for part in model.modules():
            if type(part) is nn.BatchNorm2d:
                part.__class__ = BatchNormOfAll  # differs in what forward does only
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Undo apply."""
        for part in model.modules():
            if type(part) is BatchNormOfAll:
                part.__class__ = nn.BatchNorm2d
        return model


class BatchNormOfAll(nn.BatchNorm2d):
    """A batch norm whose batch is that of all processes together; their parts may differ in size."""

    def forward(self, image: Tensor) -> Tensor:
        """Normalise [B, C, H, W]; all processes must call this where the statistics are the batch's."""
        of_batch = self.training or self.running_mean is None
        if not of_batch or not torch.distributed.is_initialized():
            return super().forward(image)
        variance, mean = torch.var_mean(image.float(), (0, 2, 3), correction=0)
        count = torch.full_like(mean, image.numel() / image.shape[1])
        # Each process fills its row, so that the sum holds the rows of all.
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        rows = [torch.stack([mean, variance, count]) * (row == rank) for row in range(world_size)]
        means, variances, counts = SumOfAll.apply(torch.stack(rows)).unbind(1)  # each [processes, C]
        total = counts.sum(0)
        mean = (counts * means).sum(0) / total
        variance = (counts * (variances + (means - mean).square())).sum(0) / total
        if self.training and self.running_mean is not None:
            self.update(mean.detach(), variance.detach() * total / (total - 1))
        scale = (variance + self.eps).rsqrt() * self.weight
        mean, scale, bias = (each[:, None, None] for each in (mean, scale, self.bias))
        return ((image - mean) * scale + bias).to(image.dtype)

    @torch.no_grad()
    def update(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics [C] towards those of a batch."""
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)


class SumOfAll(torch.autograd.Function):
    """Sum of a tensor over the processes; each process's part gets the sum of all their gradients."""

    @staticmethod
    def forward(context, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        torch.distributed.all_reduce(total)
        return total
