"Inputs that several tests use."

import torch
from torch import nn


def related(rows, inputs, seed=0):
    "Inputs that depend on each other, some much larger than others."
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, inputs, generator=g)
        @ torch.randn(inputs, inputs, generator=g)
        * torch.logspace(-1, 1, inputs)[torch.randperm(inputs, generator=g)]
    )


class Holder(nn.Module):
    "A module with the given tensors as buffers."

    def __init__(self, **tensors):
        super().__init__()
        for k, t in tensors.items():
            self.register_buffer(k, t)
