"""``python -m scaling.data`` as a person meets it: what it prints, what it refuses, what it leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from scaling import sweep
from scaling.data import __main__ as data

REPO = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder of texts, in a working directory with a cache of its own."""
    (tmp_path / "texts").mkdir()
    rng = np.random.default_rng(0)
    for i in range(60):
        words = " ".join(rng.choice(["alpha", "beta", "gamma", "delta", "epsilon"], 40))
        (tmp_path / "texts" / f"{i:02}.txt").write_text(f"{i} {words}\n")
    monkeypatch.setenv("SCALING_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_prepare_then_describe(folder, capsys):
    assert data.main(["prepare", "text:texts", "--tokenizer", "bpe:300", "--workers", "1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith(f"prepared: {folder / 'cache'}")
    assert data.main(["describe", "text:texts", "--tokenizer", "bpe:300", "--out", "told.json"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    size = sum(p.stat().st_size for p in (folder / "texts").iterdir())
    for phrase in ("documents 60, of them", f"text {size:,} bytes", "by bpe:300, vocabulary", "licence not known"):
        assert phrase in out
    [told] = json.loads((folder / "told.json").read_text())
    assert told["leakage"]["exact_duplicates"] == 0
    assert told["num_documents"] == 60
    assert told["fingerprint"] in out


def test_describe_without_the_package_for_near_duplicates_says_what_it_did_not_do(folder, capsys, monkeypatch):
    source = "3 * text:texts + 1 * text:more"
    (folder / "more").mkdir()
    for i in range(60):
        (folder / "more" / f"{i}.txt").write_text(f"another {i} " * 9)
    monkeypatch.setitem(sys.modules, "rensa", None)
    assert data.main(["prepare", source]) == 0
    assert data.main(["describe", source, "--out", "told.json"]) == 0
    out = capsys.readouterr().out
    assert out.count("not looked for: that takes the package rensa") == 2
    assert out.count("0 equal documents") == 2
    [told] = json.loads((folder / "told.json").read_text())
    assert [part["leakage"]["near_duplicates"] for part in told["sources"]] == [None, None]
    assert data.main(["prepare", source, "--near-duplicates", "drop"]) == 2
    assert "write data.near_duplicates: keep" in capsys.readouterr().err


def test_a_synthetic_source_is_described_by_its_entropy(folder, capsys):
    assert data.main(["prepare", "synthetic:markov?symbols=5&order=1"]) == 0
    assert not list(folder.glob("**/*.bin"))
    assert data.main(["describe", "synthetic:markov?symbols=5&order=1", "--out", "told.json"]) == 0
    [told] = json.loads((folder / "told.json").read_text())
    out = capsys.readouterr().out
    assert f"{told['entropy_rate']:.6f} nats per token" in out
    assert f"{told['best_loss']:.6f} expected over its windows" in out


def test_a_mixture_is_described_source_by_source(folder, capsys):
    (folder / "more").mkdir()
    for i in range(60):
        (folder / "more" / f"{i}.txt").write_text(f"another {i} " * 9)
    source = "3 * text:texts + 1 * text:more"
    assert data.main(["prepare", source]) == 0
    assert data.main(["describe", source, "--no-leakage"]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.strip() in ("text:texts", "text:more")] == [
        "text:texts",
        "text:more",
    ]


def test_a_mixture_is_told_what_leaks_across_its_sources(folder, capsys):
    """The second source holds copies of the first with a word added: of those held out here, some train there."""
    (folder / "more").mkdir()
    for path in (folder / "texts").iterdir():
        (folder / "more" / path.name).write_text(path.read_text() + "more\n")
    source = "1 * text:texts + 1 * text:more"
    for near in ("keep", "drop"):
        assert data.main(["prepare", source, "--near-duplicates", near, "--workers", "1"]) == 0
        assert data.main(["describe", source, "--near-duplicates", near, "--out", f"{near}.json"]) == 0
    told = {near: json.loads((folder / f"{near}.json").read_text())[0] for near in ("keep", "drop")}
    found = [row["train_documents"] for row in told["keep"]["leakage_across"]]
    assert min(found) > 0
    assert [row["train_documents"] for row in told["drop"]["leakage_across"]] == [0, 0]
    removed = [part["num_near_duplicates_across_sources"] for part in told["drop"]["sources"]]
    assert removed == found
    out = " ".join(capsys.readouterr().out.split())
    assert f"near, across sources: {found[0]} train documents of text:texts, of" in out
    assert f"{found[0]} near (near_duplicates: drop; {found[0]} of them of other sources)" in out


GRID = "base: {{data: {data}, model: {{width: 16}}, horizon: {{tokens: 1e5}}}}\n"


def test_a_grid_names_its_corpora_once(folder, capsys):
    (folder / "g.yaml").write_text(
        GRID.format(data="{source: 'text:texts', tokenizer: 'bpe:300'}")
        + "axes: {data.seq_len: [16, 32], data.unique_tokens: [400, 800, null]}\n"
    )
    assert data.main(["prepare", "--grid", "g.yaml"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len({line for line in printed if line.startswith("prepared: ")}) == 1
    assert sum("training on" in line for line in printed) == 1
    [prepared] = [p for p in (folder / "cache").iterdir() if p.name.startswith("text-texts")]
    assert (prepared / "by_hash.bin").exists()


BAD = [
    (["text:nowhere"], "no file there; write text:<folder> or a glob"),
    (["c4"], "data.source is 'c4': write python-stdlib, tfds:<name>[/config]"),
    (["tfds:wiki40/en"], "did you mean tfds:wiki40b"),
    (["text:texts/00.txt"], "of its 1 distinct documents none falls into"),
    (["text:empty"], "of its 0 distinct documents none falls into train"),
    (["text:bad/latin1.txt"], "latin1.txt: byte 0xe9 at offset 3 is not UTF-8"),
    (["text:texts", "--tokenizer", "bpe:12"], "tokenizer is 'bpe:12': write bytes, bpe:<size> with a size of 257"),
    (["text:texts", "--tokenizer", "words"], "tokenizer is 'words': write bytes"),
    (["text:texts", "--tokenizer", "file:gone.json"], "no such file: write file:<path>"),
    (["text:texts", "--validation-fraction", "1.5"], "validation_fraction is 1.5: write a number in (0, 1)"),
    (["tokens:texts"], "no texts/tokens.json: write one"),
    (["tokens:bad"], "token 1 is 7: tokens.json says vocab_size 5"),
    ([], "write a SOURCE or --grid FILE"),
    (["text:texts", "--grid", "g.yaml"], "write a SOURCE or --grid FILE, one of them"),
    (["--grid", "gone.yaml"], "gone.yaml: no such grid file"),
    (["1 * text:texts + 2"], "write a mixture as <weight> * <source>"),
]


@pytest.mark.parametrize("arguments, says", BAD)
def test_bad_input_is_one_line_and_exit_2_and_leaves_nothing(folder, capsys, arguments, says):
    (folder / "empty").mkdir()
    (folder / "empty" / "a.txt").write_text("")
    (folder / "bad").mkdir()
    (folder / "bad" / "latin1.txt").write_bytes("caf\xe9".encode("latin-1"))
    np.array([1, 7], "<u2").tofile(folder / "bad" / "a.bin")
    (folder / "bad" / "tokens.json").write_text('{"vocab_size": 5, "dtype": "uint16", "separator_id": 0}')
    assert data.main(["prepare", *arguments, "--workers", "1"]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    cache = folder / "cache"
    assert not cache.exists() or all(p.suffix == ".lock" for p in cache.iterdir())


def test_what_is_not_prepared_cannot_be_described(folder, capsys):
    assert data.main(["describe", "text:texts"]) == 2
    assert "no tokens prepared for it in" in capsys.readouterr().err


def test_files_that_change_under_a_corpus_are_refused(folder, capsys):
    assert data.main(["prepare", "text:texts"]) == 0
    (folder / "texts" / "00.txt").write_text("changed")
    assert data.main(["prepare", "text:texts"]) == 2
    assert "its files changed since" in capsys.readouterr().err


def test_a_tokenizer_that_changes_under_a_corpus_is_refused(folder, capsys):
    assert data.main(["prepare", "text:texts", "--tokenizer", "bpe:300"]) == 0
    [trained] = (folder / "cache").glob("bpe-300-*/tokenizer.json")
    (folder / "t.json").write_bytes(trained.read_bytes())
    assert data.main(["prepare", "text:texts", "--tokenizer", "file:t.json"]) == 0
    (folder / "t.json").write_bytes(trained.read_bytes() + b"\n")
    capsys.readouterr()
    assert data.main(["prepare", "text:texts", "--tokenizer", "file:t.json"]) == 2
    assert "data.tokenizer is 'file:t.json': that file changed since" in capsys.readouterr().err


def limited(arguments: list[str], **kwargs) -> subprocess.CompletedProcess:
    """The command in a process of its own that may write no file larger than 100 kB."""
    code = (
        "import resource, sys\nfrom scaling.data import __main__ as data\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\nsys.exit(data.main(sys.argv[1:]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False, **kwargs)


def test_a_disk_that_fills_up_is_one_line_and_exit_2(folder):
    (folder / "large.jsonl").write_text("".join(json.dumps({"text": f"{i} " + "x" * 900}) + "\n" for i in range(400)))
    done = limited(["prepare", "text:large.jsonl", "--workers", "1"], cwd=folder)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "make room, or name another folder in SCALING_CACHE" in done.stderr
    assert not [p for p in (folder / "cache").iterdir() if not p.name.startswith(".")]


@pytest.mark.slow
def test_killed_and_given_again(folder):
    (folder / "large.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} " + "x" * 9000}) + "\n" for i in range(12_000))
    )
    command = [sys.executable, "-m", "scaling.data", "prepare", "text:large.jsonl", "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    work = folder / "cache"
    while process.poll() is None and not list(work.glob(".*.work/part-*.json")):
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert "were done before" in done.stdout
    [killed] = json.loads(described(folder, "cache"))
    subprocess.run(command, cwd=folder, env=environment | {"SCALING_CACHE": "fresh"}, check=True, timeout=60)
    [untouched] = json.loads(described(folder, "fresh"))
    assert killed["fingerprint"] == untouched["fingerprint"]


def described(folder: Path, cache: str) -> str:
    os.environ["SCALING_CACHE"] = str(folder / cache)
    assert data.main(["describe", "text:large.jsonl", "--no-leakage", "--out", str(folder / "told.json")]) == 0
    return (folder / "told.json").read_text()


SWEEPS = [
    ("{source: 'text:texts', unique_tokens: 10}", "", "write at least one window, data.seq_len 128"),
    ("{source: 'text:texts', unique_tokens: 100000000}", "", "the train split of text:texts has"),
    ("{source: 'text:texts', seq_len: 100000}", "", "a window takes 100001: add text or shorten the windows"),
    ("{source: 'tokens:tokens'}", "", "base.data.source: model.vocab_size is missing; write what tokens.json says"),
    ("{source: 'text:texts', tokenizer: 'bpe:300'}", "vocab_size: 200, ", "model.vocab_size is 200: write"),
    ("{source: 'text:texts'}", "", "epochs of the"),
]


@pytest.mark.parametrize("told, model, says", SWEEPS)
def test_a_sweep_refuses_data_that_cannot_serve_it(folder, capsys, told, model, says):
    horizon = "1e9" if says == "epochs of the" else "1e5"
    grid = GRID.format(data=told).replace("width", f"{model}width").replace("1e5", horizon)
    (folder / "g.yaml").write_text(grid)
    assert sweep.main(["--grid", "g.yaml", "--executor", "inline", "--plan"]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
