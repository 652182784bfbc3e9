"""Batch norm over the images of all processes, also where torch has none: its SyncBatchNorm needs a GPU.

Letters: B images of this process, C channels.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from common.processes import collectives


class TogetherBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d whose means and variances in training are those of all processes' images.

    The gradient of the mean of the processes' losses is the mean of their gradients, as DistributedDataParallel takes
    it. Where there is one process it is nn.BatchNorm2d.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, H, W): the same shape."""
        if not self.training or collectives.processes() == 1:
            return super().forward(input)
        x = input.float()
        sums = torch.cat([x.sum((0, 2, 3)), x.square().sum((0, 2, 3)), x.new_tensor([x.numel() / x.shape[1]])])
        sums = all_reduce(sums)
        C, count = x.shape[1], sums[-1].detach()
        mean = sums[:C] / count
        variance = (sums[C : 2 * C] / count - mean.square()).clamp_min(0)
        self._follow(mean.detach(), (variance * count / (count - 1).clamp_min(1)).detach())
        scale = self.weight * torch.rsqrt(variance + self.eps)
        out = x * scale.view(1, -1, 1, 1) + (self.bias - mean * scale).view(1, -1, 1, 1)
        return out.to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        assert self.momentum is not None and self.running_mean is not None and self.running_var is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked += 1


def together(module: nn.Module, gpu: bool) -> Any:
    """Make every batch norm of `module` see the images of all processes; returns it, unchanged if there is one."""
    if collectives.processes() == 1:
        return module
    if gpu:
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            made = TogetherBatchNorm(child.num_features, child.eps, child.momentum)
            made.load_state_dict(child.state_dict())
            setattr(module, name, made)
        else:
            together(child, gpu)
    return module
