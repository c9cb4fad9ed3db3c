"""A small script's model and data, for tests of what ranks must have alike."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import TensorDataset


class Net(nn.Module):
    def __init__(self, width: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(2))
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(width, 1)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.drop(x))


def data(count: int = 16, width: int = 8) -> TensorDataset:
    return TensorDataset(torch.randn(count, width, generator=torch.Generator().manual_seed(1)))
