"""Documents → token arrays: in parts that any number of processes share, killed and resumed at will.

A part of the source becomes a shard a split. When all are there the first of equal documents is kept, the shards are
hashed one after the other, and the folder is moved to its name: nothing half-written is ever seen under it. Neither the
number of processes nor interruptions nor hosts change a byte of it.
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import heapq
import json
import multiprocessing
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scaling.config import DataConfig
from scaling.data import shards, sources, synthetic, tokenizers
from scaling.data.preparing import duplicates_across, finish
from scaling.data.preparing.tokenise import Job, do_part, report_path
from scaling.data.shards import SCHEMA, read_manifest
from scaling.data.stream import Stream
from scaling.records import write_json

# BPE is trained on so much text at most: the documents of the train split whose hashes are smallest, a fair sample that
# depends on nothing but the text.
BPE_SAMPLE_BYTES = 128 * 2**20

Progress = Callable[[str], None]


def folder_of(config: DataConfig, cache_dir: Path) -> Path:
    """Where the token arrays of this source, tokenizer and split rule lie; ``seq_len`` does not enter.

    Raises ValueError for a mixture, which has a folder a source: see ``sources.components``.
    """
    return Path(cache_dir) / _folder_name(config, config)


def _folder_name(config: DataConfig, whole: DataConfig) -> str:
    """``whole`` is the mixture that ``config`` is a part of: its tokenizer may be trained on all of it."""
    trained_on = whole.source if config.bpe_size is not None else config.source
    key = [SCHEMA, config.source, config.tokenizer, config.text_key, config.validation_fraction, trained_on]
    if config.near_duplicates != "keep":
        key.append(config.near_duplicates)
    slug = re.sub(r"[^A-Za-z0-9]+", "-", config.source).strip("-")[-40:]
    kind = re.sub(r"[^A-Za-z0-9]+", "-", config.tokenizer).strip("-")[-20:]
    return f"{slug}-{kind}-{shards.digest(key)[:12]}"


Found = list[tuple[float, DataConfig, Path]]


def folders_of(config: DataConfig, cache_dir: Path) -> Found:
    """(weight, config, folder) of each source of ``config``; a synthetic one has no folder."""
    found = _folders_alone(config, cache_dir)
    if config.near_duplicates == "keep" or len(found) < 2:
        return found
    # What is near depends on what all of them hold out, whatever their weights and order.
    mixed = shards.digest(sorted(folder.name for *_, folder in found))[:12]
    return [(weight, part, folder.with_name(f"{folder.name}-in-{mixed}")) for weight, part, folder in found]


def _folders_alone(config: DataConfig, cache_dir: Path) -> Found:
    """As ``folders_of``, where each source is prepared before it is held against the others of its mixture."""
    if synthetic.is_synthetic(config.source):
        return []
    return [(weight, part, Path(cache_dir) / _folder_name(part, config)) for weight, part in sources.components(config)]


def is_prepared(config: DataConfig, cache_dir: Path) -> bool:
    """Whether ``open`` would find it."""
    wanted = "by_hash.json" if config.unique_tokens is not None else "manifest.json"
    return all((folder / wanted).exists() for *_, folder in folders_of(config, cache_dir))


def prepare(
    config: DataConfig,
    cache_dir: Path,
    progress: Progress | None = None,
    *,
    workers: int = 1,
    share: tuple[int, int] = (1, 1),
) -> list[Path]:
    """Builds the token arrays of ``config`` unless they are there, and returns their folders, one a source (of a
    synthetic one, none).

    Nothing half-written is ever seen. Processes that race wait for the first. One that was killed leaves the parts that
    were done, and the next goes on from there.

    Args:
      cache_dir: a local or shared folder (it is memory-mapped, so no bucket).
      progress: called with a line of text now and then.
      workers: processes that read and tokenise; 1: this one.
      share: (i, n): do every n-th part only, the i-th share of 1…n, one a host; the last host to finish seals. While
        parts are missing the folder of that source is not among those returned.

    Raises:
      ValueError: bad source, no text in one of the splits, text or tokenizer files that changed since the arrays were
        built, a full disk.
    """
    if synthetic.is_synthetic(config.source):
        Stream(config)  # raises what is wrong with it; there is nothing to build
        return []
    cache_dir, progress = Path(cache_dir), progress or (lambda line: None)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        found = folders_of(config, cache_dir)
        if all(folder.exists() for *_, folder in found):
            return [_checked(part, folder, progress) for _, part, folder in found]
        alone = _folders_alone(config, cache_dir)
        trained = None
        if any(not folder.exists() for *_, folder in alone):
            trained = trained_tokenizer(config, cache_dir, progress)
        ready = [
            _checked(part, folder, progress)
            for _, part, folder in alone
            if folder.exists() or _build(part, folder, trained, progress, workers, share)
        ]
        if found == alone or len(ready) < len(alone):
            return ready if found == alone else []
        return _hold_against_each_other(config, ready, [folder for *_, folder in found], progress)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.ENOTDIR):
            raise
        raise ValueError(
            f"{cache_dir}: {os.strerror(e.errno)} ({_free(cache_dir)}): make room, or name another folder in "
            "SCALING_CACHE; the same command goes on from here"
        ) from e


def _checked(config: DataConfig, folder: Path, progress: Progress) -> Path:
    """A folder that is there, after a look at what may have changed under it, with the order that subsets need."""
    _refuse_changed_files(config, folder)
    if config.unique_tokens is not None:
        with _locked(folder.parent / f".{folder.name}.lock"):
            finish.order_by_hash(config, folder, progress)
    return folder


def _hold_against_each_other(
    config: DataConfig, alone: list[Path], targets: list[Path], progress: Progress
) -> list[Path]:
    """Makes of the folders of a mixture's sources those without near duplicates across them; returns these."""
    shards.require_one_tokenizer(config.source, map(read_manifest, alone))
    for folder, target in zip(alone, targets):
        with _locked(target.parent / f".{target.name}.lock") as locked:
            if target.exists():
                continue
            work = target.parent / f".{target.name}.work"
            if locked:
                shutil.rmtree(work, ignore_errors=True)  # of one that was killed
                work.mkdir()
            else:
                work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
            try:
                duplicates_across.separate(
                    folder, [other for other in alone if other != folder], work, target, progress
                )
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return targets


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e9:.3g} GB free"
    except OSError:
        return "not there"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Holds an advisory lock; yields False on a file system without locks, where racers build the same thing twice."""
    import fcntl

    with path.open("w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True  # released when the file is closed, also by kill -9


# --- The tokenizer ---------------------------------------------------------------------------------------------------


def trained_tokenizer(config: DataConfig, cache_dir: Path, progress: Progress) -> Path | None:
    """The file of a bpe:<size>, trained on the train split of all sources of ``config`` unless it was; else None."""
    size = config.bpe_size
    if size is None:
        tokenizers.load(config.tokenizer)  # its file or library may be missing: say so before anything is read
        return None
    parts = sources.components(config)
    key = [
        config.source,
        config.text_key,
        config.validation_fraction,
        size,
        [sources.current_state(c) for _, c in parts],
    ]
    folder = cache_dir / f"bpe-{size}-{shards.digest(key)[:12]}"
    path = folder / "tokenizer.json"
    if not path.exists():
        folder.mkdir(exist_ok=True)
        with _locked(folder / ".lock"), tempfile.TemporaryDirectory(dir=folder) as work:
            if not path.exists():
                texts: list[str] = []
                for weight, part in parts:
                    progress(f"{part.source}: reading, to train {config.tokenizer}")
                    texts += _sample(part, Path(work), weight * BPE_SAMPLE_BYTES)
                progress(f"{config.tokenizer}: training on {sum(map(len, texts)) / 1e6:.1f} M characters")
                tokenizers.train_bpe(texts, size, Path(work) / "tokenizer.json")
                os.replace(Path(work) / "tokenizer.json", path)
    return path


def _sample(config: DataConfig, work: Path, num_bytes: float) -> list[str]:
    """Distinct documents of the train split, in order of their hash, up to about ``num_bytes``.

    Held at any time: those of the smallest hashes so far.
    """
    source = sources.survey(config, work)
    if source.tokens is not None:
        raise ValueError(
            f"data.tokenizer is {config.tokenizer!r}: {config.source} is tokenised already: write tokenizer: bytes, "
            "which such a source does not use"
        )
    kept: list[tuple[int, str]] = []  # a heap of the largest hash first
    held, seen = 0, set()
    for part in source.parts:
        content: Any
        for name, content in sources.documents(config, part, work):
            try:
                digest = hashlib.sha256(tokenizers.utf8(content)).digest()
            except ValueError as e:
                raise ValueError(f"{name}: {e}") from None
            order = int.from_bytes(digest, "big")
            if not content or order in seen or shards.split_of(digest, config.validation_fraction) != "train":
                continue
            heapq.heappush(kept, (-order, content))
            seen.add(order)
            held += len(content.encode())
            while held > num_bytes and len(kept) > 1:
                order, dropped = heapq.heappop(kept)
                seen.discard(-order)
                held -= len(dropped.encode())
    return [content for _, content in sorted(kept, reverse=True)]


# --- Parts -----------------------------------------------------------------------------------------------------------


def _build(
    config: DataConfig, folder: Path, trained: Path | None, progress: Progress, workers: int, share: tuple[int, int]
) -> bool:
    """Does the parts that are not done yet and, when all are there, seals the folder. False: others have parts left."""
    lock = folder.parent / f".{folder.name}.lock"
    work = folder.parent / f".{folder.name}.work"
    alone_here = contextlib.nullcontext(True) if share != (1, 1) else _locked(lock)
    with alone_here as locked:
        if not locked:  # racers must not meet in one folder: the first to finish wins
            work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        if folder.exists():
            return True
        if (work / "manifest.json").exists():  # killed when all was done but the move
            finish.move(work, folder)
            return True
        try:
            job, source = _plan(config, work, trained)
            _do_parts(job, source, progress, workers, share)
            if not all(report_path(work, number).exists() for number in range(len(source.parts))):
                progress(f"{config.source}: this share is done; the host that does the last part puts it together")
                return False
            with contextlib.nullcontext() if share == (1, 1) else _locked(lock):
                if not folder.exists():
                    finish.seal(job, source, folder, progress)
        except ValueError:
            shutil.rmtree(work, ignore_errors=True)
            raise
        finally:
            if not locked:
                shutil.rmtree(work, ignore_errors=True)
    return True


def _plan(config: DataConfig, work: Path, trained: Path | None) -> tuple[Job, sources.Source]:
    """Looks at the source; clears away parts that were made from another state of it."""
    work.mkdir(exist_ok=True)
    source = sources.survey(config, work)
    job = Job(config, trained, work, source.tokens)
    tokenizer = job.tokenizer()
    rule = [config.text_key, config.validation_fraction]
    identity = shards.digest([SCHEMA, source.version, source.state, source.parts, tokenizer["fingerprint"], rule])
    path = work / "plan.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = None
    if known != identity:
        for old in [*work.glob("*-[0-9]*.*"), *work.glob(".*.tmp")]:
            old.unlink(missing_ok=True)
        write_json(path, identity)
    done = sum(part.num_bytes for n, part in enumerate(source.parts) if report_path(work, n).exists())
    itemsize = tokenizers.token_dtype(tokenizer["vocab_size"]).itemsize
    need = (source.num_bytes - done) * (itemsize if tokenizer["name"] == "bytes" else 1)
    free = shutil.disk_usage(work).free
    if need > free:
        raise ValueError(
            f"{work.parent}: {config.source} takes about {need / 1e9:.3g} GB there and {free / 1e9:.3g} GB are "
            "free: make room, or name another folder in SCALING_CACHE"
        )
    return job, source


def _do_parts(job: Job, source: sources.Source, progress: Progress, workers: int, share: tuple[int, int]) -> None:
    index, count = share
    mine = {n: part for n, part in enumerate(source.parts) if n % count == index - 1}
    todo = {n: part for n, part in mine.items() if not report_path(job.work, n).exists()}
    told = _Told(job.config.source, sum(p.num_bytes for p in mine.values()), progress)
    told.done(sum(part.num_bytes for n, part in mine.items() if n not in todo), resumed=True)
    if workers == 1 or len(todo) < 2:
        for number, part in todo.items():
            do_part(job, number, part)
            told.done(part.num_bytes)
        return
    # Spawned, not forked: the parent may hold JAX's or Arrow's threads.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(todo)), mp_context=context) as pool:
        waiting = {pool.submit(do_part, job, number, part): part for number, part in todo.items()}
        try:
            for future in concurrent.futures.as_completed(waiting):
                future.result()
                told.done(waiting[future].num_bytes)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


class _Told:
    """Tells how far the parts are, how fast it goes and how long it will take."""

    def __init__(self, source: str, total: int, progress: Progress):
        self._source, self._total, self._progress = source, total, progress
        self._done = self._resumed = 0
        self._started = self._last = time.monotonic()
        progress(f"{source}: reading")

    def done(self, num_bytes: int, resumed: bool = False) -> None:
        self._done += num_bytes
        self._resumed += num_bytes if resumed else 0
        now = time.monotonic()
        if resumed and num_bytes:
            self._progress(f"{self._source}: {num_bytes / 1e6:.1f} MB were done before")
        elif now - self._last > 2 and self._done < self._total:
            self._last = now
            rate = (self._done - self._resumed) / (now - self._started)
            self._progress(
                f"{self._source}: {self._done / 1e6:.0f} of {self._total / 1e6:.0f} MB, {rate / 1e6:.1f} MB/s, "
                f"{(self._total - self._done) / rate:.0f} s left"
            )


def _refuse_changed_files(config: DataConfig, folder: Path) -> None:
    """Files that changed under a built corpus are an error: to train on the old text in silence is worse."""
    manifest = read_manifest(folder)
    state = sources.current_state(config)
    if state is not None and state != manifest["source_state"]:
        raise ValueError(
            f"data.source is {config.source!r}: its files changed since {folder} was built from them: "
            "delete that folder to build it again (same text, same fingerprint)"
        )
    try:
        path = tokenizers.file_of(config.tokenizer)
    except ValueError:  # gone; the arrays do not need it
        return
    if path is not None and hashlib.sha256(path.read_bytes()).hexdigest() != manifest["tokenizer"]["fingerprint"]:
        raise ValueError(
            f"data.tokenizer is {config.tokenizer!r}: that file changed since {folder} was built with it: delete that "
            "folder to build it again, or bring the old file back"
        )
