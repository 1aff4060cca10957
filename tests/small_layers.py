# SPDX-License-Identifier: Apache-2.0
"""A small layer of every kind, and inputs for it: what holds on a CPU is held against other devices."""

import torch
from torch import nn

import rankfall as rf

IDS = torch.randint(600, (4, 9), generator=torch.Generator().manual_seed(0))
TOKENS = torch.linspace(-1, 1, 4 * 6 * 12).view(4, 6, 12)


class SelfAttention(nn.Module):
    """As torch's transformer layers call it."""

    def __init__(self, format: rf.TT) -> None:
        super().__init__()
        self.attention = rf.nn.MultiheadAttention(12, 3, batch_first=True, format=format, posterior=rf.Point())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padding = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]) == x.shape[1] - 1
        return self.attention(x, x, x, padding, need_weights=False)[0]


LAYERS = {
    "linear": (lambda f: rf.nn.Linear(12, 20, format=f, posterior=rf.Point()), (TOKENS,)),
    "embedding": (lambda f: rf.nn.Embedding(600, 12, padding_idx=3, format=f, posterior=rf.Point()), (IDS,)),
    "table": (lambda f: rf.nn.Embedding(60, 12, format=f, posterior=rf.Point()), (IDS.repeat(50, 1) % 60,)),
    "bag": (lambda f: rf.nn.EmbeddingBag(600, 12, format=f, posterior=rf.Point()), (IDS,)),
    "padded bag": (lambda f: rf.nn.EmbeddingBag(600, 12, padding_idx=3, format=f, posterior=rf.Point()), (IDS,)),
    "bag of offsets": (
        lambda f: rf.nn.EmbeddingBag(600, 12, mode="sum", format=f, posterior=rf.Point()),
        (IDS[0], torch.tensor([0, 2, 2])),
    ),
    "convolution": (
        lambda f: rf.nn.Conv2d(4, 6, 3, format=f, posterior=rf.Point()),
        (torch.linspace(-1, 1, 512).view(2, 4, 8, 8),),
    ),
    "LSTM": (
        lambda f: rf.nn.LSTM(12, 8, bidirectional=True, batch_first=True, format=f, posterior=rf.Point()),
        (TOKENS,),
    ),
    "GRU": (lambda f: rf.nn.GRU(12, 8, num_layers=2, format=f, posterior=rf.Point()), (TOKENS,)),
    "attention": (lambda f: rf.nn.MultiheadAttention(12, 3, format=f, posterior=rf.Point()), (TOKENS, TOKENS, TOKENS)),
    "self-attention": (SelfAttention, (TOKENS,)),
}
