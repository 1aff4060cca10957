# SPDX-License-Identifier: Apache-2.0
"""Replaces modules inside a model."""

from collections.abc import Mapping

from torch import nn


def swap_(model: nn.Module, replacements: Mapping[int, nn.Module]) -> nn.Module:
    """Puts new modules in the place of old ones, wherever a model holds them, and returns the model.

    Args:
        model: Any module. If it is itself replaced, only the returned module is the new one.
        replacements: New modules by the id() of the old ones.
    """
    if id(model) in replacements:
        return replacements[id(model)]
    for module in list(model.modules()):
        # Not named_children: it gives a module that is held under two names once.
        for name, child in list(module._modules.items()):
            if child is not None and id(child) in replacements:
                setattr(module, name, replacements[id(child)])
    return model
