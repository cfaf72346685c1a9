"""Near duplicates between a train and a validation split, of one source or of two in a mixture: found by MinHash,
confirmed by counting.

Two documents are near when their sets of five-word runs overlap by Jaccard's |A ∩ B| / |A ∪ B| ≥ .8. MinHash with
banding (Broder 1997; Leskovec et al., Mining of Massive Datasets, ch. 3), by the library rensa, proposes pairs: with 32
bands of 4 it misses one of Jaccard .8 with probability (1 - .8⁴)³² = 5e-8. Each proposal is then counted exactly, so
what is reported is exact but for such misses. Exact duplicates cannot be split: a document's hash decides its split.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scaling.data import shards, tokenizers

JACCARD = 0.8
_WORDS = 5
_NUM_PERM, _NUM_BANDS, _SEED = 128, 32, 1
_EXAMPLES = 5


class Missing(ValueError):
    """The package that finds near duplicates is not installed."""


Decode = Callable[[np.ndarray], str]


@dataclass(frozen=True)
class Split:
    """Documents to compare: the shards ``lines`` of ``folder``. ``decode`` None: by runs of token ids, not of words."""

    folder: Path
    lines: list[dict]
    dtype: np.dtype
    decode: Decode | None

    def texts_of(self, line: dict) -> Iterator[str]:
        """The documents of one shard, in order."""
        tokens = shards.map_shard(self.folder, line, self.dtype)
        for ids in shards.documents_of(tokens, shards.index_of(self.folder, line)):
            yield self.decode(ids) if self.decode else " ".join(map(str, ids.tolist()))


def splits_of(folder: Path) -> dict[str, Split]:
    """The splits of a prepared folder. Raises ValueError if it is damaged or its tokenizer is missing."""
    manifest = shards.read_manifest(folder)
    name = manifest["tokenizer"]["name"]
    decode = None if name == "tokens" else tokenizers.load(name, folder / "tokenizer.json").decode
    return {
        split: Split(folder, entry["shards"], np.dtype(entry["dtype"]), decode)
        for split, entry in manifest["splits"].items()
    }


@dataclass(frozen=True)
class Near:
    """Documents of a train split that have a near duplicate in a validation split, and the other way round."""

    near: list[np.ndarray]  # for each train shard, which of its documents
    num_train: int
    num_validation: int
    examples: list[dict]  # of the nearest pairs: jaccard, how each begins


def near(train: Split, validation: Split, progress: Callable[[str], None] = lambda line: None) -> Near:
    """Compares every document of ``train`` with all of ``validation``, which are tokenised alike.

    Memory is that of validation's signatures, about 2 kB a document. Raises Missing if rensa is not installed.
    """
    rensa = _import_rensa()
    progress("near duplicates: signatures of validation")
    found = rensa.RMinHashLSH(threshold=JACCARD, num_perm=_NUM_PERM, num_bands=_NUM_BANDS)
    held_out = _Random(validation)
    for key, text in enumerate(held_out.texts()):
        found.insert(key, _signature(rensa, _shingles(text)))
    marks, pairs, hit = [], [], set()
    for done, line in enumerate(train.lines, 1):
        marked = np.zeros(line["documents"], bool)
        for i, text in enumerate(train.texts_of(line)):
            shingles = _shingles(text)
            for key in found.query(_signature(rensa, shingles)):
                overlap = _jaccard(shingles, _shingles(held_out.text(key)))
                if overlap >= JACCARD:
                    marked[i] = True
                    hit.add(key)
                    pairs.append((overlap, text[:60], held_out.text(key)[:60]))
        pairs = sorted(pairs, reverse=True)[:_EXAMPLES]
        marks.append(marked)
        progress(f"near duplicates: {done} of {len(train.lines)} shards compared")
    examples = [{"jaccard": j, "train": text, "validation": other} for j, text, other in pairs]
    return Near(marks, sum(int(m.sum()) for m in marks), len(hit), examples)


def leakage(folder: Path, progress: Callable[[str], None] = lambda line: None) -> dict:
    """What of a prepared corpus is both in train and in validation: ``exact_duplicates`` by hash, which the split rule
    makes impossible, and ``near_duplicates``; and what preparation removed. Without the package rensa
    ``near_duplicates`` is None and ``not_looked_for`` says why.

    Raises ValueError if the tokenizer is missing.
    """
    manifest, splits = shards.read_manifest(folder), splits_of(folder)
    indexes = {
        name: np.concatenate([shards.index_of(folder, line) for line in split.lines]) for name, split in splits.items()
    }
    hashes = {s: set(zip(i["hash"].tolist(), i["more_hash"].tolist())) for s, i in indexes.items()}
    told = {
        "exact_duplicates": len(hashes["train"] & hashes["validation"]),
        "near_duplicates": None,
        "removed": {
            "duplicates": manifest["num_duplicates_removed"],
            "near_duplicates_from_train": manifest["num_near_duplicates_removed"],
            "empty": manifest["num_empty_removed"],
        },
    }
    try:
        found = near(splits["train"], splits["validation"], progress)
    except Missing as e:
        return told | {"not_looked_for": str(e)}
    return told | {
        "near_duplicates": {
            "jaccard": JACCARD,
            "train_documents": found.num_train,
            "validation_documents": found.num_validation,
            "share_of_validation_documents": found.num_validation / len(indexes["validation"]),
            "examples": found.examples,
        }
    }


def leakage_across(folders: Sequence[Path], progress: Callable[[str], None] = lambda line: None) -> list[dict]:
    """Near duplicates between the train split of each of a mixture's sources and the validation split of each other:
    a row an ordered pair, ``train``, ``validation`` (the sources), ``train_documents``, ``validation_documents``,
    ``examples``. Equal documents are of one split, whichever source they stand in.

    Raises Missing if rensa is not installed, ValueError if the tokenizer is missing.
    """
    sources = {folder: shards.read_manifest(folder)["source"] for folder in folders}
    splits = {folder: splits_of(folder) for folder in folders}
    rows = []
    for mine, other in itertools.permutations(folders, 2):
        found = near(splits[mine]["train"], splits[other]["validation"], progress)
        rows.append(
            {
                "train": sources[mine],
                "validation": sources[other],
                "train_documents": found.num_train,
                "validation_documents": found.num_validation,
                "examples": found.examples,
            }
        )
    return rows


def _import_rensa():
    try:
        import rensa
    except ImportError:
        raise Missing(
            "near duplicates: that takes the package rensa: pip install 'scaling[dedup]', or write "
            "data.near_duplicates: keep"
        ) from None
    return rensa


class _Random:
    """The texts of a split by number, one shard held at a time."""

    def __init__(self, split: Split):
        self._split = split
        self._ends = np.cumsum([line["documents"] for line in split.lines])
        self._held: tuple[int, list[str]] = (-1, [])

    def texts(self) -> Iterator[str]:
        for key in range(int(self._ends[-1])):
            yield self.text(key)

    def text(self, key: int) -> str:
        number = int(np.searchsorted(self._ends, key, side="right"))
        if self._held[0] != number:
            self._held = (number, list(self._split.texts_of(self._split.lines[number])))
        return self._held[1][key - (int(self._ends[number - 1]) if number else 0)]


def _shingles(text: str) -> set[str]:
    words = text.split()
    if len(words) <= _WORDS:
        return {" ".join(words)}
    return {" ".join(words[i : i + _WORDS]) for i in range(len(words) - _WORDS + 1)}


def _signature(rensa, shingles: set[str]):
    signature = rensa.RMinHash(num_perm=_NUM_PERM, seed=_SEED)
    signature.update(list(shingles))
    return signature


def _jaccard(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b)
