"""A hundred small documents of made-up words: enough text for sweeps of seconds."""

import random
from pathlib import Path


def write(folder: str | Path) -> None:
    """Makes ``folder`` with the documents; the same at every call."""
    dice = random.Random(1)
    words = ["".join(dice.choices("abcdefghij", k=dice.randint(2, 7))) for _ in range(200)]
    Path(folder).mkdir()
    for i in range(100):
        Path(folder, f"{i}.txt").write_text(" ".join(dice.choices(words, k=400)))
