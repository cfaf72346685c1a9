"""Finished parts → a corpus: equal documents left out, shards hashed, the manifest written, the folder moved."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from scaling.config import DataConfig
from scaling.data import shards, sources, tokenizers
from scaling.data.preparing import duplicates
from scaling.data.preparing.tokenise import Job, report_path
from scaling.data.shards import SCHEMA, SPLITS, read_manifest
from scaling.records import write_json

Progress = Callable[[str], None]


def seal(job: Job, source: sources.Source, folder: Path, progress: Progress) -> None:
    """Leaves out equal documents (and near ones, if asked), hashes, writes the manifest, moves the folder."""
    config, work, tokenizer = job.config, job.work, job.tokenizer()
    reports = [json.loads(report_path(work, n).read_text(encoding="utf-8")) for n in range(len(source.parts))]
    dtype = tokenizers.token_dtype(tokenizer["vocab_size"])
    removed = {"num_duplicates_removed": 0, "num_near_duplicates_removed": 0}
    lines, originals = {}, {split: [r[split] for r in reports if r[split]["documents"]] for split in SPLITS}
    for split in SPLITS:
        keep = _first_of_equals(work, originals[split])
        removed["num_duplicates_removed"] += sum(int((~k).sum()) for k in keep)
        lines[split] = shards.only(work, originals[split], keep, dtype)
    if config.near_duplicates == "drop" and all(lines.values()):
        decode = None if job.format else tokenizers.load(config.tokenizer, job.trained).decode
        splits = {split: duplicates.Split(work, lines[split], dtype, decode) for split in SPLITS}
        found = duplicates.near(splits["train"], splits["validation"], progress)
        removed["num_near_duplicates_removed"] = found.num_train
        lines["train"] = shards.only(work, lines["train"], [~near for near in found.near], dtype)
    _require_both_splits(config, lines)
    has_bytes = source.tokens is None or source.tokens.bytes_per_token is not None
    entries = {split: split_entry(work, lines[split], dtype, has_bytes) for split in SPLITS}
    manifest = {
        "schema": SCHEMA,
        "source": config.source,
        "source_version": source.version,
        "source_state": source.state,
        "licence": source.licence,
        "tokenizer": tokenizer,
        "split_rule": f"first 64 bits of sha256(text) < {config.validation_fraction!r} * 2^64: validation",
        "splits": entries,
        "num_empty_removed": sum(r["num_empty"] for r in reports),
        "num_lossy_validation_documents": sum(r["num_lossy"] for r in reports),
        **removed,
    }
    if job.trained is not None:
        shutil.copyfile(job.trained, work / "tokenizer.json")
    write_manifest(work, manifest)
    move(work, folder)
    counts = [sum(s[name] for s in entries.values()) for name in ("documents", "tokens")]
    progress(f"{config.source}: {counts[0]:,} documents, {counts[1] / 1e6:.1f} M tokens")


def _first_of_equals(work: Path, lines: list[dict]) -> list[np.ndarray]:
    """For each shard which of its documents come first among those of equal hash.

    Equal documents are of one split, so a split at a time is looked at; 32 bytes a document are held, and sorted.
    """
    indexes = [shards.index_of(work, line) for line in lines]
    if not indexes:
        return []
    hashes = np.concatenate([index["hash"] for index in indexes])
    more = np.concatenate([index["more_hash"] for index in indexes])
    order = np.lexsort((more, hashes))  # stable: among equals the first stays first
    again = np.zeros(len(order), bool)
    again[1:] = (hashes[order][1:] == hashes[order][:-1]) & (more[order][1:] == more[order][:-1])
    keep = np.ones(len(order), bool)
    keep[order[again]] = False
    return np.split(keep, np.cumsum([len(index) for index in indexes])[:-1])


def _require_both_splits(config: DataConfig, lines: dict[str, list[dict]]) -> None:
    total = sum(line["documents"] for split in SPLITS for line in lines[split])
    for split in SPLITS:
        if not lines[split]:
            raise ValueError(
                f"data.source is {config.source!r}: of its {total} distinct documents none falls into {split} at "
                f"validation_fraction {config.validation_fraction}: add documents (a file or a JSONL line is one), "
                "or change the fraction"
            )


def split_entry(work: Path, lines: list[dict], dtype: np.dtype, has_bytes: bool) -> dict:
    """A split's entry in the manifest; ``has_bytes``: whether it is known how many bytes of text its tokens are."""
    return {
        "tokens": sum(line["tokens"] for line in lines),
        "text_bytes": sum(line["text_bytes"] for line in lines) if has_bytes else None,
        "documents": sum(line["documents"] for line in lines),
        "dtype": dtype.str,
        "sha256": shards.hash_stream(work, lines),
        "shards": lines,
    }


def write_manifest(work: Path, manifest: dict) -> None:
    """Writes the manifest, with the fingerprint of what it names and a hash of itself."""
    manifest = {**manifest, "fingerprint": fingerprint(manifest)}
    write_json(work / "manifest.json", {**manifest, "manifest_sha256": shards.digest(manifest)})


def fingerprint(manifest: dict) -> str:
    """sha256 over both token arrays, the tokenizer and the split rule: equal if and only if every batch is equal."""
    arrays = {split: (s["sha256"], s["dtype"]) for split, s in manifest["splits"].items()}
    return shards.digest([arrays, manifest["tokenizer"], manifest["split_rule"]])


def move(work: Path, folder: Path) -> None:
    """Removes all but what the manifest names and gives the folder its name."""
    splits = read_manifest(work)["splits"].values()
    named = {line["file"] for entry in splits for line in entry["shards"]}
    keep = {"manifest.json", "tokenizer.json"} | named | {Path(name).with_suffix(".npy").name for name in named}
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name not in keep:
            path.unlink()
    work.chmod(0o755)  # mkdtemp's 0700 would shut others out of a shared cache
    try:
        os.replace(work, folder)
    except OSError:
        if not folder.exists():  # else another process was first, and built the same
            raise


def order_by_hash(config: DataConfig, folder: Path, progress: Progress) -> None:
    """Writes the train split once more with its documents in order of their hash, of which every ``unique_tokens`` is
    a beginning: a small subset lies inside a large one."""
    target = folder / "by_hash.json"
    if target.exists():
        return
    progress(f"{config.source}: putting the train split in order of its documents' hashes")
    manifest = read_manifest(folder)
    entry = manifest["splits"]["train"]
    dtype, lines = np.dtype(entry["dtype"]), entry["shards"]
    indexes = [shards.index_of(folder, line) for line in lines]
    arrays = [shards.map_shard(folder, line, dtype) for line in lines]
    index = np.concatenate(indexes)
    shard_of = np.repeat(np.arange(len(indexes)), [len(i) for i in indexes])
    ends = np.concatenate([np.cumsum(i["tokens"]) for i in indexes]).astype(np.int64)
    temporary = folder / f".by_hash.{os.getpid()}.tmp"
    sha256 = hashlib.sha256()
    with open(temporary, "wb") as f:
        for i in np.lexsort((index["more_hash"], index["hash"])):
            chunk = arrays[shard_of[i]][ends[i] - int(index["tokens"][i]) : ends[i]].tobytes()
            f.write(chunk)
            sha256.update(chunk)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, folder / "by_hash.bin")
    line = {"file": "by_hash.bin", "tokens": entry["tokens"], "sha256": sha256.hexdigest()}
    write_json(target, line)
