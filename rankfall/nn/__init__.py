# SPDX-License-Identifier: Apache-2.0
"""Layers with torch's signatures whose weight is a low-rank tensor."""

from rankfall.nn._attention import MultiheadAttention as MultiheadAttention
from rankfall.nn._conv import Conv1d as Conv1d
from rankfall.nn._conv import Conv2d as Conv2d
from rankfall.nn._conv import Conv3d as Conv3d
from rankfall.nn._embedding import Embedding as Embedding
from rankfall.nn._embedding import EmbeddingBag as EmbeddingBag
from rankfall.nn._linear import Linear as Linear
from rankfall.nn._recurrent import GRU as GRU
from rankfall.nn._recurrent import LSTM as LSTM
