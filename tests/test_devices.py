# SPDX-License-Identifier: Apache-2.0
"""What a model needs is made where the model is: under a default device of another kind nothing goes astray."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rankfall as rf


class Everything(nn.Module):
    """A layer of each kind, on a few words and a picture of one channel."""

    def __init__(self, kind):
        super().__init__()
        self.words = rf.nn.Embedding(200, 8, padding_idx=0, format=kind(3))
        self.bags = rf.nn.EmbeddingBag(50, 8, mode="sum", format=kind(3))
        self.attention = rf.nn.MultiheadAttention(8, 2, batch_first=True, format=kind(2))
        self.lstm = rf.nn.LSTM(8, 6, batch_first=True, format=kind(2))
        self.gru = rf.nn.GRU(6, 4, bidirectional=True, batch_first=True, format=kind(2))
        self.pixels = nn.Sequential(rf.nn.Conv2d(1, 4, 3, format=kind(2)), nn.BatchNorm2d(4))
        self.head = rf.nn.Linear(8 + 8 + 4, 3, format=kind(4))

    def forward(self, words, picture):
        said = self.words(words)
        said = self.gru(self.lstm(self.attention(said, said, said)[0])[0])[0].mean(1)
        return self.head(torch.cat([said, self.bags(words % 50), self.pixels(picture).mean((2, 3))], 1))


def nll(model, batch):
    return F.cross_entropy(model(*batch[:-1]), batch[-1], reduction="none")


@pytest.fixture
def elsewhere():
    """Tensors that are made without a device, or with that of nobody's choice, hold no numbers and fit nothing."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def trained(kind, batches, selection=None):
    torch.set_default_device(None)
    model = Everything(kind)
    torch.set_default_device("meta")
    optimizer = torch.optim.Adam(rf.parameter_groups(model, 2e-3), fused=True)  # Its counters lie with the model.
    options = {"epochs": 6, "num_data": 128, "kl_warmup": 1, "progress": False}
    history = rf.fit(model, batches, nll, optimizer=optimizer, selection=selection or rf.Evidence(), **options)
    return model, history


@pytest.mark.usefixtures("elsewhere")
def test_training_and_cutting_stay_on_the_device(kind):
    cpu = partial(torch.randint, device="cpu")
    batches = [
        (cpu(200, (32, 5)), torch.randn(32, 1, 6, 6, device="cpu"), cpu(3, (32,), generator=torch.Generator()))
        for _ in range(4)
    ]
    model, history = trained(kind, batches)
    assert any(record["selection"] != "wait" for record in history)
    assert history[-1]["parameters"] < history[0]["parameters"]
    rf.canonicalize_(model)
    assert rf.predict(model.head.train(), torch.zeros(2, 20, device="cpu"), samples=2).device.type == "cpu"
    trained(kind, batches, rf.Shrinkage(0.5))
    assert {p.device.type for p in model.parameters()} == {"cpu"}


@pytest.mark.usefixtures("elsewhere")
def test_decompositions_stay_on_the_device(kind):
    dense = nn.Sequential(nn.Linear(12, 20, device="cpu"), nn.Linear(20, 9, device="cpu"))
    rf.tensorize_(dense, kind(3), from_dense=True)
    assert {p.device.type for p in dense.parameters()} == {"cpu"}
    assert dense(torch.zeros(2, 12, device="cpu")).device.type == "cpu"
