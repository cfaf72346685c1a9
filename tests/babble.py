"""A hundred small documents of made-up words: enough text for sweeps of seconds."""

import os
import random
from pathlib import Path


def write(folder: str | Path) -> None:
    """Makes ``folder`` with the documents; the same at every call, their dates too, so that one cache serves all."""
    dice = random.Random(1)
    words = ["".join(dice.choices("abcdefghij", k=dice.randint(2, 7))) for _ in range(200)]
    Path(folder).mkdir()
    for i in range(100):
        path = Path(folder, f"{i}.txt")
        path.write_text(" ".join(dice.choices(words, k=400)))
        os.utime(path, (0, 0))
