"""Text to a token array once; ``batch(step)`` ever after.

    prepare(config, cache_dir)            # reads the source, tokenises, writes memory-mapped shards and a manifest
    corpus = open(config, cache_dir)      # numpy and the standard library only
    x = corpus.batch(step, batch_size, seed)

A document's split is decided by the hash of its text, so it never moves when others are added; exact duplicates are
dropped. A batch is a function of its step.
"""

from scaling.data.corpus import Corpus
from scaling.data.mixture import Mixture, epochs_of, open
from scaling.data.permutation import permute
from scaling.data.preparing.duplicates import leakage, leakage_across
from scaling.data.preparing.preparation import folder_of, folders_of, is_prepared, prepare
from scaling.data.shards import SPLITS, TokenArray, split_of

__all__ = [
    "SPLITS", "Corpus", "Mixture", "TokenArray", "epochs_of", "folder_of", "folders_of", "is_prepared", "leakage",
    "leakage_across", "open", "permute", "prepare", "split_of",
]  # fmt: skip
