# SPDX-License-Identifier: Apache-2.0
"""Rows of a low-rank table against F.embedding on a table that shares no code with the library."""

import torch
import torch.nn.functional as F
from torch import nn

import rankfall as rf
from laws import close, drawn, naive_dense

SEED = 3


def gradients_match(actual, expected, leaves):
    direction = torch.randn_like(expected)
    close(actual, expected)
    for ours, theirs in zip(
        torch.autograd.grad(actual, leaves, direction, allow_unused=True, materialize_grads=True),
        torch.autograd.grad(expected, leaves, direction, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        close(ours, theirs)


def layer_around(weight, cls=rf.nn.Embedding, **options):
    dense = (nn.Embedding if cls is rf.nn.Embedding else nn.EmbeddingBag)(*weight.shape, device="meta", **options)
    return cls.around(weight, dense)


def check_rows(t, ids):
    layer = layer_around(t)
    for mode in (layer.train(), layer.eval()):
        expected = F.embedding(ids, naive_dense(t, drawn(t, SEED)))
        torch.manual_seed(SEED)
        gradients_match(mode(ids), expected, [*t.factors, *(t.log_stds if t.training else [])])
