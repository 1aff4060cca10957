# SPDX-License-Identifier: Apache-2.0
"""Layers with torch's signatures whose weight is a low-rank tensor."""

from rankfall.nn._linear import Linear as Linear
