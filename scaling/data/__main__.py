"""The command for data: prepares a corpus for training, and says what is in it.

    python -m scaling.data prepare python-stdlib
    python -m scaling.data prepare tfds:wiki40b/en --tokenizer bpe:8192 --workers 8
    python -m scaling.data prepare --grid sweeps/chinchilla.yaml
    python -m scaling.data describe text:notes

A sweep prepares what it needs by itself; this is for corpora large enough to want workers, several hosts, or a look.
"""

import argparse
import dataclasses
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scaling import fields, grid, machine, records, storage, terminal
from scaling.config import DataConfig

DONE, BAD_INPUT, INTERRUPTED = 0, 2, 130


@terminal.outliving_its_reader()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code (2: bad input, said in one line)."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args, _configs(args), storage.cache_dir())
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        typed = shlex.join(sys.argv[1:] if argv is None else argv)
        print(f"interrupted; go on from here with: python -m scaling.data {typed}", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scaling.data",
        description="Prepares a corpus for training, and says what is in it.",
        epilog="Exit codes: 0 done; 2 bad input; 130 interrupted. Environment: SCALING_CACHE is the folder for what is "
        "prepared (default .scaling/data); TFDS_DATA_DIR that of TFDS datasets.",
    )
    commands = parser.add_subparsers(required=True, metavar="prepare | describe")
    prepare = commands.add_parser("prepare", help="tokenise, split, leave out duplicates; stop and go on at will")
    _add_source(prepare)
    prepare.add_argument(
        "--workers", type=_positive, default=len(machine.cores()),
        metavar="N", help="processes that read and tokenise (default: one a core)",
    )  # fmt: skip
    prepare.add_argument(
        "--share", type=_share, default=(1, 1), metavar="I/N",
        help="do the I-th of N shares, one a host, into a cache that all see; the last to finish puts it together",
    )  # fmt: skip
    prepare.set_defaults(run=_prepare)
    describe = commands.add_parser("describe", help="sizes, counts and what leaks from validation into training")
    _add_source(describe)
    describe.add_argument("--out", type=Path, metavar="FILE", help="also write it as JSON")
    describe.add_argument("--no-leakage", action="store_true", help="do not look for near duplicates")
    describe.set_defaults(run=_describe)
    return parser


def _add_source(parser: argparse.ArgumentParser) -> None:
    default = DataConfig()
    parser.add_argument(
        "source", nargs="?", metavar="SOURCE",
        help="python-stdlib, tfds:<name>[/config], text:<folder or glob>, tokens:<folder>, synthetic:<name>, or a "
        "mixture such as '0.7 * python-stdlib + 0.3 * text:notes'",
    )  # fmt: skip
    parser.add_argument("--grid", metavar="FILE", help="every corpus that this grid trains on, instead of SOURCE")
    parser.add_argument("--tokenizer", metavar="T", help=f"bytes, bpe:<size> or file:<path> ({default.tokenizer})")
    parser.add_argument("--text-key", metavar="K", help=f"key of the text in TFDS and JSON lines ({default.text_key})")
    parser.add_argument(
        "--validation-fraction", type=float, metavar="F", help=f"of the documents ({default.validation_fraction})"
    )
    parser.add_argument(
        "--near-duplicates", choices=("keep", "drop"),
        help=f"of validation documents, in train ({default.near_duplicates})",
    )  # fmt: skip


def _positive(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number ≥ 1")
    return int(text)


def _share(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 1 ≤ I ≤ N, e.g. 1/4")
    return int(match[1]), int(match[2])


def _configs(args: argparse.Namespace) -> list[DataConfig]:
    """The corpora that are meant, each once."""
    names = ("tokenizer", "text_key", "validation_fraction", "near_duplicates")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if (args.source is None) == (args.grid is None):
        raise ValueError("write a SOURCE or --grid FILE, one of them")
    if args.grid is None:
        return [DataConfig(source=args.source, **given)]
    if given:
        raise ValueError(f"--{next(iter(given)).replace('_', '-')} goes with SOURCE: the grid says it itself")
    # Horizons are of no matter here, and epochs of what is not prepared yet are any number of tokens.
    every = {cell.run.data: None for cell in grid.load(args.grid, lambda data: 10**9).cells}
    # Windows and subsets are cut from the same arrays; a subset has them put in order as well.
    unique = {dataclasses.replace(c, seq_len=1, unique_tokens=c.unique_tokens and 1): c for c in every}
    return list(unique.values())


def _prepare(args: argparse.Namespace, configs: list[DataConfig], cache_dir: Path) -> int:
    from scaling import data

    for data_config in configs:
        folders = data.prepare(data_config, cache_dir, _say, workers=args.workers, share=args.share)
        for folder in folders:
            print(f"prepared: {folder}")
    return DONE


def _say(line: str) -> None:
    print(line, flush=True)


def _describe(args: argparse.Namespace, configs: list[DataConfig], cache_dir: Path) -> int:
    from scaling import data

    found = []
    for data_config in configs:
        corpus = data.open(data_config, cache_dir)
        described = corpus.describe()
        parts = described.get("sources", [described])
        for part, (_, one, folder) in zip(parts, data.folders_of(data_config, cache_dir)):
            leakage = None if args.no_leakage else data.leakage(folder)
            _show(part, _rows(part, one, folder, leakage), leakage)
            part |= {"folder": str(folder), "leakage": leakage}
        if len(parts) > 1 and not args.no_leakage and all(part["leakage"]["near_duplicates"] for part in parts):
            folders = [folder for *_, folder in data.folders_of(data_config, cache_dir)]
            described["leakage_across"] = data.leakage_across(folders)
            _show_across(described["leakage_across"])
        if "entropy_rate" in described:
            _show(described, _synthetic_rows(described))
        found.append({"config": fields.to_dict(data_config), **described})
    if args.out:
        records.write_json(args.out, found)
        print(f"written: {args.out}")
    return DONE


def _show(told: dict, rows: Sequence[tuple[str, str]], leakage: dict | None = None) -> None:
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name, value in rows:
        table.add_row(name, value)
    console = terminal.console(sys.stdout, width=200, fold=False)
    console.print(terminal.text((told["source"], "bold")))
    console.print(table)
    for pair in leakage["near_duplicates"]["examples"] if leakage and leakage["near_duplicates"] else []:
        console.print(f"  {pair['jaccard']:.2f}: {pair['train']!r} / {pair['validation']!r}")
    console.print()


def _show_across(rows: Sequence[dict]) -> None:
    """What leaks from the validation of one source of a mixture into the training of another."""
    for row in rows:
        print(
            f"near, across sources: {row['train_documents']:,} train documents of {row['train']}, of "
            f"{row['validation_documents']:,} that {row['validation']} holds out"
        )
    print()


def _rows(told: dict, data_config: DataConfig, folder: Path, leakage: dict | None) -> list[tuple[str, str]]:
    num_tokens = told["train_tokens"] + told["validation_tokens"]
    size: Any = told["text_bytes"]
    rows = [
        ("version", told["source_version"] or "–"),
        ("licence", told["licence"] or "not known"),
        ("documents", f"{told['num_documents']:,}, of them {told['num_validation_documents']:,} held out"),
        ("text", "not known" if size is None else f"{size:,} bytes"),
        ("tokens", f"{num_tokens:,} by {told['tokenizer']}, vocabulary {told['vocab_size']:,}"),
        ("train, validation", f"{told['train_tokens']:,}, {told['validation_tokens']:,} tokens"),
        ("bytes per token", "not known" if size is None else f"{1 / told['tokens_per_byte']:.4f} in validation"),
        ("split", told["split_rule"]),
        ("left out", f"{told['num_duplicates_removed']} equal, {told['num_empty_removed']} empty, "
         f"{told['num_near_duplicates_removed']} near (near_duplicates: {data_config.near_duplicates}"
         + (f"; {across} of them of other sources" if (across := told["num_near_duplicates_across_sources"]) else "")
         + ")"),
    ]  # fmt: skip
    if told["num_lossy_validation_documents"]:
        rows.append(("not decoded to themselves", f"{told['num_lossy_validation_documents']:,} validation documents"))
    if leakage:
        rows.append(("in train and validation", f"{leakage['exact_duplicates']} equal documents"))
        rows.append(_near_row(leakage))
    return [*rows, ("fingerprint", told["fingerprint"]), ("folder", str(folder))]


def _near_row(leakage: dict) -> tuple[str, str]:
    near = leakage["near_duplicates"]
    if near is None:
        return "near", "not looked for: that takes the package rensa: pip install 'scaling[dedup]'"
    return (
        f"near, Jaccard ≥ {near['jaccard']}",
        f"{near['train_documents']:,} train documents, of {near['validation_documents']:,} in validation "
        f"({100 * near['share_of_validation_documents']:.1f} %)",
    )


def _synthetic_rows(told: dict) -> list[tuple[str, str]]:
    return [
        ("vocabulary", f"{told['vocab_size']:,}"),
        ("validation", f"{told['validation_tokens']:,} tokens"),
        ("entropy rate", f"{told['entropy_rate']:.6f} nats per token"),
        ("least loss", f"{told['best_loss']:.6f} expected over its windows, {told['best_validation_loss']:.6f} on "
         "this validation split"),
        ("fingerprint", told["fingerprint"]),
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
