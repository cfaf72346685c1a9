"""One part of a source → a shard a split, and a report of what was counted. Worker processes do this."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from scaling.config import DataConfig
from scaling.data import shards, sources, tokenizers
from scaling.data.shards import SPLITS
from scaling.records import write_json


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker process needs to do any part. ``trained`` is the file of a BPE trained here; ``format`` is set of a
    source that is tokenised already."""

    config: DataConfig
    trained: Path | None
    work: Path
    format: sources.TokenFormat | None

    def tokenizer(self) -> dict:
        """The tokenizer's entry in the manifest."""
        if self.format is not None:
            return {
                "name": "tokens",
                "fingerprint": self.format.fingerprint,
                "vocab_size": self.format.vocab_size,
                "separator_id": 0,
            }
        tokenizer = tokenizers.load(self.config.tokenizer, self.trained)
        return {
            "name": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "separator_id": tokenizer.separator_id,
        }


def do_part(job: Job, number: int, part: sources.Part) -> dict:
    """Tokenises one part into a shard a split; returns, and leaves beside them, what was counted."""
    described = job.tokenizer()
    tokenizer = None if job.format else tokenizers.load(job.config.tokenizer, job.trained)
    writers = {
        split: shards.ShardWriter(
            job.work / f"{split}-{number:05}.bin", described["vocab_size"], described["separator_id"]
        )
        for split in SPLITS
    }
    num_empty = num_lossy = 0
    try:
        for name, content in sources.documents(job.config, part, job.work):
            if not len(content):
                num_empty += 1
                continue
            try:
                ids, raw = _encoded(content, tokenizer)
            except ValueError as e:
                raise ValueError(f"{name}: {e}") from None
            digest = hashlib.sha256(raw).digest()
            split = shards.split_of(digest, job.config.validation_fraction)
            if tokenizer is None:
                text_bytes = round(len(ids) * (job.format.bytes_per_token or 0))  # type: ignore[union-attr]  # no tokenizer: it has a format
            else:
                text_bytes = len(raw)
                if split == "validation" and not tokenizer.lossless:
                    num_lossy += tokenizer.decode(ids) != content
            writers[split].append(digest, ids, text_bytes)
        report: dict[str, Any] = {split: writer.finish() for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.close()
    report |= {"num_empty": num_empty, "num_lossy": num_lossy}
    write_json(report_path(job.work, number), report)
    return report


def _encoded(content: Any, tokenizer: tokenizers.Tokenizer | None) -> tuple[np.ndarray, bytes]:
    """Token ids and the bytes whose hash names the document."""
    if tokenizer is None:
        return content, content.astype("<u4").tobytes()
    return tokenizer.encode(content), tokenizers.utf8(content)


def report_path(work: Path, number: int) -> Path:
    return work / f"part-{number:05}.json"
