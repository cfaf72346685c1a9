"""Near duplicates across the sources of a mixture: train documents of one that are near what another holds out.

Each source was prepared alone, and rid of its own. What else a mixture asks depends on what it is mixed with, so its
sources get folders of their own, in which all that stays as it was is a link to the folder it was prepared in.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from scaling.data import shards
from scaling.data.preparing import duplicates, finish

Progress = Callable[[str], None]


def separate(folder: Path, others: Sequence[Path], work: Path, target: Path, progress: Progress) -> None:
    """Makes ``target`` of the prepared ``folder``, without the train documents that are near a validation document in
    one of ``others``. ``work`` is an empty folder beside it.

    Raises ValueError if nothing is left, or rensa or the tokenizer is missing.
    """
    manifest, splits = shards.read_manifest(folder), duplicates.splits_of(folder)
    train = splits["train"]
    near = [np.zeros(line["documents"], bool) for line in train.lines]
    for other in others:
        name = shards.read_manifest(other)["source"]
        found = duplicates.near(train, duplicates.splits_of(other)["validation"], progress)
        near = [mine | more for mine, more in zip(near, found.near)]
        progress(f"{manifest['source']}: {found.num_train:,} train documents are near what {name} holds out")
    if all(mine.all() for mine in near):
        raise ValueError(
            f"data.near_duplicates is 'drop': every train document of {manifest['source']} is near one that another "
            "source of the mixture holds out: leave that source out, or write keep"
        )
    for split in splits.values():
        for line in split.lines:
            _link(folder, work, line["file"])
            _link(folder, work, Path(line["file"]).with_suffix(".npy").name)
    if (folder / "tokenizer.json").exists():
        _link(folder, work, "tokenizer.json")
    lines = shards.only(work, train.lines, [~mine for mine in near], train.dtype)
    count = sum(int(mine.sum()) for mine in near)
    has_bytes = manifest["splits"]["train"]["text_bytes"] is not None
    manifest["splits"]["train"] = finish.split_entry(work, lines, train.dtype, has_bytes)
    manifest["num_near_duplicates_removed"] += count
    manifest["num_near_duplicates_across_sources"] = count
    finish.write_manifest(work, manifest)
    finish.move(work, target)


def _link(folder: Path, work: Path, name: str) -> None:
    try:
        os.link(folder / name, work / name)
    except OSError:  # a file system without hard links
        shutil.copyfile(folder / name, work / name)
