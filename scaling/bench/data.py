"""How fast one core prepares text, cuts batches and generates synthetic sources: the rows of ``python -m scaling.bench
--data``."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from scaling import records
from scaling.config import DataConfig
from scaling.data import corpus, mixture, sources, stream, synthetic
from scaling.data.preparing import preparation, tokenise
from scaling.machine import processor

TOKENIZERS = ("bytes", "bpe:1024", "bpe:8192")
SYNTHETIC = tuple(f"{synthetic.PREFIX}{name}" for name in synthetic.PROCESSES)
# Of the standard library; about as much in one go as a part of a large corpus.
_TEXT_BYTES = 8 * 2**20
_DOCUMENT_CHARS = 4000
_BATCH_WINDOWS = 16


def measure(tokenizers: tuple[str, ...] = TOKENIZERS, text_bytes: int = _TEXT_BYTES) -> list[dict]:
    """A row a tokenizer, in this process: ``train_seconds``; ``mb_per_s`` of text read, tokenised, hashed, split and
    written, and ``tokens_per_s`` of the same; ``batch_us``, microseconds for a batch of 16 windows of 128."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.jsonl"
        size = _write_text(path, text_bytes)
        for tokenizer in tokenizers:
            config = DataConfig(source=f"text:{path}", tokenizer=tokenizer)
            started = time.perf_counter()
            trained = preparation.trained_tokenizer(config, Path(folder), lambda line: None)
            train_seconds = time.perf_counter() - started
            whole = sources.survey(config, Path(folder)).parts[0]
            job = tokenise.Job(config, trained, Path(folder), None)
            started = time.perf_counter()
            report = tokenise.do_part(job, 0, whole)
            seconds = time.perf_counter() - started
            preparation.prepare(config, Path(folder) / "cache")
            tokens = sum(report[split]["tokens"] for split in ("train", "validation"))
            rows.append(
                {
                    "tokenizer": tokenizer,
                    "train_seconds": train_seconds if trained else None,
                    "mb_per_s": size / 1e6 / seconds,
                    "tokens_per_s": tokens / seconds,
                    "bytes_per_token": size / tokens,
                    "batch_us": _batch_us(mixture.open(config, Path(folder) / "cache")),
                }
            )
    return rows


def _write_text(path: Path, text_bytes: int) -> int:
    """JSON lines of standard-library modules cut into documents, about ``text_bytes`` of text; how many there are."""
    size = 0
    with path.open("w", encoding="utf-8") as f:
        for module in sources.stdlib_files():
            text = module.read_text(encoding="utf-8", errors="ignore").replace("\0", "")
            for start in range(0, len(text), _DOCUMENT_CHARS):
                piece = text[start : start + _DOCUMENT_CHARS]
                f.write(json.dumps({"text": piece}, ensure_ascii=False) + "\n")
                size += len(piece.encode())
            if size > text_bytes:
                break
    return size


def measure_synthetic(names: tuple[str, ...] = SYNTHETIC, blocks: int = 16) -> list[dict]:
    """A row a source that is generated while it is read, in this process, over ``blocks`` blocks of windows of 128:
    ``setup_seconds``, of its tables and its entropy; ``tokens_per_s``; ``batch_us``, microseconds for a batch of 16
    windows, on average; ``slowest_batch_us``, for the slowest, which a block had to be made for."""
    rows = []
    for source in names:
        synthetic.process.cache_clear()  # else its tables may be there already
        started = time.perf_counter()
        opened = stream.Stream(DataConfig(source=source))
        opened.batch(0, _BATCH_WINDOWS, seed=1)
        setup_seconds = time.perf_counter() - started
        times = _batch_times(opened, blocks * stream.BLOCK_WINDOWS // _BATCH_WINDOWS)
        rows.append(
            {
                "source": source,
                "setup_seconds": setup_seconds,
                "tokens_per_s": len(times) * _BATCH_WINDOWS * opened.seq_len / sum(times),
                "batch_us": 1e6 * sum(times) / len(times),
                "slowest_batch_us": 1e6 * max(times),
            }
        )
    return rows


def _batch_us(opened: Any) -> float:
    opened.batch(0, _BATCH_WINDOWS, 0)
    times = _batch_times(opened, 500)
    return 1e6 * sum(times) / len(times)


def _batch_times(opened: corpus.Corpus | stream.Stream, steps: int) -> list[float]:
    """Seconds of each of the first ``steps`` batches, in order."""
    times = []
    for step in range(steps):
        started = time.perf_counter()
        opened.batch(step, _BATCH_WINDOWS, 0)
        times.append(time.perf_counter() - started)
    return times


def show(console: Console, out: Path | None) -> None:
    """The speed of preparing text and of cutting batches, by tokenizer, and of generating the sources whose entropy is
    known. Raises ValueError without a tokenizer's library."""
    rows = measure()
    table = Table(title=f"{processor()}, one process", title_justify="left")
    for heading in ("tokenizer", "training s", "MB/s", "tokens/s", "bytes/token", "µs a batch of 16×128"):
        table.add_column(heading, justify="right")
    for row in rows:
        trained = "–" if row["train_seconds"] is None else f"{row['train_seconds']:.1f}"
        table.add_row(
            row["tokenizer"], trained, f"{row['mb_per_s']:.1f}", f"{row['tokens_per_s']:,.0f}",
            f"{row['bytes_per_token']:.2f}", f"{row['batch_us']:.0f}",
        )  # fmt: skip
    console.print(table)
    generated = measure_synthetic()
    table = Table(title="generated while they are read", title_justify="left")
    for heading in ("source", "tables s", "tokens/s", "µs a batch of 16×128", "slowest"):
        table.add_column(heading, justify="right")
    for row in generated:
        table.add_row(
            row["source"], f"{row['setup_seconds']:.2f}", f"{row['tokens_per_s']:,.0f}", f"{row['batch_us']:.0f}",
            f"{row['slowest_batch_us']:,.0f}",
        )  # fmt: skip
    console.print(table)
    if out:
        payload = {"processor": processor(), "rows": rows, "synthetic": generated}
        records.write_json(out, {**payload, "environment": records.software()})
