# SPDX-License-Identifier: Apache-2.0
"""Click logs in Criteo's own format."""

import random


def click_lines(rows: int, seed: int = 0) -> list[str]:
    """Lines of a label, 13 integers and 26 hexadecimal numbers, some of them missing."""
    draw = random.Random(seed)
    counts = [["" if draw.random() < 0.2 else str(draw.randint(-2, 500)) for _ in range(13)] for _ in range(rows)]
    ids = [
        ["" if draw.random() < 0.1 else f"{draw.randint(0, 3 + k) * 0x9E3779B9 % 2**32:08x}" for k in range(26)]
        for _ in range(rows)
    ]
    labels = [str(int(draw.random() < 0.3)) for _ in range(rows)]
    return ["\t".join([label, *c, *i]) for label, c, i in zip(labels, counts, ids, strict=True)]
