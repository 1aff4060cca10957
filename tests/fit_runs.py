# SPDX-License-Identifier: Apache-2.0
"""A small problem for rf.fit, and what runs of it are compared by."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rankfall as rf

N = 64


def data():
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(N, 12, generator=generator)
    return x, torch.tanh(x @ torch.randn(12, 3, generator=generator))


def model_of(posterior=None, kind=rf.TTM):
    torch.manual_seed(3)
    return nn.Sequential(rf.nn.Linear(12, 20, format=kind(4), posterior=posterior), nn.Tanh(), nn.Linear(20, 3))


def squared_error(model, batch):
    x, y = batch
    return (model(x) - y).square().sum(1)


def fit(model, loader=None, nll=squared_error, optimizer=None, **arguments):
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=1e-2)
    loader = [data()] if loader is None else loader
    return rf.fit(
        model,
        loader,
        nll,
        optimizer=optimizer,
        **{"epochs": 3, "num_data": N, "progress": False} | arguments,
    )


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same_bits(state, other):
    return state.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in state.items())


def shuffled(generator=None):
    return DataLoader(TensorDataset(*data()), batch_size=16, shuffle=True, generator=generator)
