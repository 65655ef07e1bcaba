"A model for worker processes, in a module that they import quickly."

import os, signal, sys

import torch
from torch import nn


class Unsendable(torch.Tensor):
    def __new__(cls):
        return torch.Tensor._make_subclass(cls, torch.ones(1, 2))

    def __reduce_ex__(self, protocol):
        raise TypeError("stays here")


class Poison(nn.Module):
    "Kills its process at -1, raises what cannot be sent at -2, and ends in other ways."

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x):
        if (x == -1).any():
            os.kill(os.getpid(), signal.SIGKILL)
        if (x == -2).any():

            class Odd(Exception):
                pass

            raise Odd("two")
        if (x == -3).any():
            raise MemoryError("three")
        if (x == -4).any():
            sys.exit("four")
        if (x == -5).any():
            raise KeyboardInterrupt("five")
        return Unsendable() if (x == -6).any() else x * 2
