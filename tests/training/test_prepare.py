"""Preparation in parts: workers, kills, hosts and full disks change nothing of what comes out."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scaling import data
from scaling.config import DataConfig
from scaling.data import shards, sources
from scaling.data.preparing import duplicates, preparation

REPO = Path(__file__).parents[2]
WORDS = ["the", "of", "and", "a", "to", "in", "is", "was", "he", "for", "it", "with", "as", "his", "on", "be", "at"]


def write_jsonl(path: Path, num_documents: int, seed: int = 0) -> list[str]:
    """A file of distinct documents of a few dozen words each; returns their texts."""
    rng = np.random.default_rng(seed)
    texts = [f"{seed}-{i} é " + " ".join(rng.choice(WORDS, rng.integers(5, 60))) for i in range(num_documents)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return texts


def config_of(source: str, **kwargs) -> DataConfig:
    return DataConfig(**{"source": source, "seq_len": 16, "validation_fraction": 0.25, **kwargs})


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of 4 kB: they are cut in this process, whoever reads them."""
    monkeypatch.setattr(sources.text, "PART_BYTES", 4096)
    monkeypatch.setattr(sources.tokens, "PART_BYTES", 4096)


@pytest.fixture
def config(tmp_path, small_parts) -> DataConfig:
    for i in range(3):
        write_jsonl(tmp_path / "texts" / f"{i}.jsonl", 120, i)
    return config_of(f"text:{tmp_path / 'texts'}")


def fingerprint(config: DataConfig, cache: Path, **kwargs) -> str:
    data.prepare(config, cache, **kwargs)
    return data.open(config, cache).fingerprint


def test_the_fingerprint_of_equal_text_is_what_it_always_was(tmp_path):
    """If this fails, committed records name data that can no longer be made."""
    (tmp_path / "texts").mkdir()
    for i in range(40):
        text = f"document {i} é " + "".join(chr(97 + (i * j) % 26) for j in range(60))
        (tmp_path / "texts" / f"{i:03}.txt").write_text(text, encoding="utf-8")
    config = config_of(f"text:{tmp_path / 'texts'}")
    assert fingerprint(config, tmp_path / "cache") == "be737584a9b035cd183859cfc97aa46ac7acc29afa96e8ff5f252e1be7c41f5b"


def test_parts_make_the_stream_that_one_part_makes(tmp_path, config, monkeypatch):
    in_parts = fingerprint(config, tmp_path / "parts")
    manifest = shards.read_manifest(data.folder_of(config, tmp_path / "parts"))
    assert len(manifest["splits"]["train"]["shards"]) > 10
    corpus = data.open(config, tmp_path / "parts")
    batches = [corpus.batch(step, 7, 1) for step in (0, 3, 10**6)]
    held_out = corpus.validation()
    monkeypatch.setattr(sources.text, "PART_BYTES", 2**30)
    assert fingerprint(config, tmp_path / "whole") == in_parts
    whole = data.open(config, tmp_path / "whole")
    assert len(whole.manifest["splits"]["train"]["shards"]) == 1
    for step, batch in zip((0, 3, 10**6), batches):
        np.testing.assert_array_equal(whole.batch(step, 7, 1), batch)
    for mine, theirs in zip(whole.validation(), held_out):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_any_number_of_workers_makes_the_same(tmp_path, config, tokenizer):
    config = dataclasses.replace(config, tokenizer=tokenizer)
    alone = fingerprint(config, tmp_path / "alone")
    assert fingerprint(config, tmp_path / "three", workers=3) == alone
    folders = [data.folder_of(config, tmp_path / name) for name in ("alone", "three")]
    names = [{p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()} for folder in folders]
    assert names[0] == names[1]


def test_hosts_that_share_make_the_same(tmp_path, config):
    for share in ((1, 3), (3, 3)):
        assert data.prepare(config, tmp_path / "cache", share=share) == []
        with pytest.raises(ValueError, match="no tokens prepared"):
            data.open(config, tmp_path / "cache")
    assert fingerprint(config, tmp_path / "cache", share=(2, 3)) == fingerprint(config, tmp_path / "alone")
    assert data.prepare(config, tmp_path / "cache", share=(1, 3))  # that it is done is seen


def test_equal_documents_in_different_parts_are_one(tmp_path, config):
    first = json.loads((tmp_path / "texts" / "0.jsonl").read_text().splitlines()[0])["text"]
    before = fingerprint(config, tmp_path / "before")
    again = "".join(json.dumps({"text": t}) + "\n" for t in (first, first, "", "", ""))
    (tmp_path / "texts" / "9.jsonl").write_text(again)
    assert fingerprint(config, tmp_path / "cache") == before
    told = data.open(config, tmp_path / "cache").describe()
    assert (told["num_duplicates_removed"], told["num_empty_removed"]) == (2, 3)
    unsealed = [p for p in data.folder_of(config, tmp_path / "cache").iterdir() if p.name.startswith("part")]
    assert not unsealed


KILLED = """
import os, sys
from pathlib import Path
from scaling.config import DataConfig
from scaling import data
from scaling.data import shards, sources
from scaling.data.preparing import finish, preparation, tokenise
sources.text.PART_BYTES = 4096
config = DataConfig(source=sys.argv[1], seq_len=16, validation_fraction=0.25)
calls = 0
def killing(function):
    def wrapped(*args, **kwargs):
        global calls
        calls += 1
        if calls == int(sys.argv[4]):
            os.kill(os.getpid(), 9)
        return function(*args, **kwargs)
    return wrapped
for module in (tokenise, preparation, finish, shards):
    if hasattr(module, sys.argv[3]):
        setattr(module, sys.argv[3], killing(getattr(module, sys.argv[3])))
data.prepare(config, Path(sys.argv[2]))
"""


@pytest.mark.parametrize(
    "where, call", [("do_part", 1), ("do_part", 9), ("write_json", 4), ("split_of", 50), ("seal", 1), ("move", 1)]
)
def test_killed_and_resumed_is_as_if_nothing_had_been(tmp_path, config, where, call):
    arguments = [config.source, str(tmp_path / "cache"), where, str(call)]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], cwd=REPO, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not data.folder_of(config, tmp_path / "cache").exists()
    lines = []
    resumed = fingerprint(config, tmp_path / "cache", progress=lines.append)
    assert resumed == fingerprint(config, tmp_path / "untouched")
    if call == 9:
        assert any("done before" in line for line in lines)
    left = {p.name for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"}
    assert left == {data.folder_of(config, tmp_path / "cache").name}


@pytest.mark.slow
def test_killed_with_its_workers_at_any_moment(tmp_path):
    """kill -9 of the whole process group, again and again, until a call lives to the end."""
    write_jsonl(tmp_path / "texts" / "a.jsonl", 30_000)
    config = config_of(f"text:{tmp_path / 'texts'}")
    code = KILLED.partition("calls = 0")[0] + "data.prepare(config, Path(sys.argv[2]), workers=2)\n"
    delay, kills = 0.6, 0
    while True:
        process = subprocess.Popen(
            [sys.executable, "-c", code.replace("4096", "65536"), config.source, str(tmp_path / "cache")],
            cwd=REPO, start_new_session=True,
        )  # fmt: skip
        try:
            assert process.wait(delay) == 0
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills, delay = kills + 1, delay * 1.3
    assert kills
    assert data.open(config, tmp_path / "cache").fingerprint == fingerprint(config, tmp_path / "untouched")


def test_parts_of_another_state_are_not_taken(tmp_path, config):
    data.prepare(config, tmp_path / "cache", share=(1, 2))
    (tmp_path / "texts" / "0.jsonl").unlink()
    assert fingerprint(config, tmp_path / "cache") == fingerprint(config, tmp_path / "fresh")


def test_a_full_disk_is_one_line_and_goes_on_later(tmp_path, config, monkeypatch):
    real, calls = shards.ShardWriter.finish, []

    def full(self):
        calls.append(self)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        return real(self)

    monkeypatch.setattr(shards.ShardWriter, "finish", full)
    with pytest.raises(
        ValueError, match=r"No space left on device \(.* GB free\): make room, or name another"
    ) as caught:
        data.prepare(config, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not data.folder_of(config, tmp_path / "cache").exists()
    assert not list((tmp_path / "cache").glob("**/*.tmp"))
    lines = []
    assert fingerprint(config, tmp_path / "cache", progress=lines.append) == fingerprint(config, tmp_path / "fresh")
    assert any("done before" in line for line in lines)


def test_too_small_a_disk_is_seen_before_anything_is_read(tmp_path, config, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(preparation.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"takes about .* GB there and 1e-06 GB are free: make room"):
        data.prepare(config, tmp_path / "cache")
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_cache_that_is_a_file(tmp_path, config):
    (tmp_path / "cache").write_text("")
    with pytest.raises(ValueError, match="SCALING_CACHE"):
        data.prepare(config, tmp_path / "cache" / "inner")


def test_progress_tells_how_far_and_how_long(monkeypatch):
    lines, now = [], iter([0.0, 1.0, 10.0])
    monkeypatch.setattr(preparation.time, "monotonic", lambda: next(now))
    told = preparation._Told("text:x", 100_000_000, lines.append)
    told.done(10_000_000, resumed=True)
    told.done(30_000_000)
    assert lines[1:] == ["text:x: 10.0 MB were done before", "text:x: 40 of 100 MB, 3.0 MB/s, 20 s left"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Peak resident memory of preparing 20 and 200 MB: the same within 60 MB."""
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom scaling.config import DataConfig\n"
        "from scaling import data\n"
        "data.prepare(DataConfig(source=sys.argv[1]), Path(sys.argv[2]))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for copies in (1, 10):
        folder = tmp_path / f"texts{copies}"
        folder.mkdir()
        with open(folder / "a.jsonl", "w") as f:
            for i in range(10_000 * copies):
                f.write(json.dumps({"text": f"{i} " + "lorem ipsum " * 170}) + "\n")
        command = [sys.executable, "-c", code, f"text:{folder}", str(tmp_path / f"cache{copies}")]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300, check=True)
        peaks.append(int(done.stdout) * 1024)
    assert peaks[1] - peaks[0] < 60e6


# --- Near duplicates -------------------------------------------------------------------------------------------------


def brute_force(train: list[str], held_out: list[str]) -> set[int]:
    def runs(text):
        words = text.split()
        return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}

    sets = [runs(text) for text in held_out]
    return {
        i for i, text in enumerate(train) if any(len(runs(text) & s) / len(runs(text) | s) >= 0.8 for s in sets)
    }  # fmt: skip


def by_split(texts: list[str]) -> tuple[list[str], list[str]]:
    split = [data.split_of(hashlib.sha256(t.encode()).digest(), 0.25) for t in texts]
    return [t for t, s in zip(texts, split) if s == "train"], [t for t, s in zip(texts, split) if s != "train"]


@pytest.fixture
def copies(tmp_path, small_parts) -> tuple[DataConfig, list[str]]:
    """Documents, and of every third a copy with a word changed near its end or in its middle."""
    texts = write_jsonl(tmp_path / "near" / "a.jsonl", 300)
    edited = []
    for i, text in enumerate(texts[::3]):
        words = text.split()
        words[-1 if i % 2 else len(words) // 2] = "changed"
        edited.append(" ".join(words))
    with open(tmp_path / "near" / "b.jsonl", "w") as f:
        f.writelines(json.dumps({"text": t}) + "\n" for t in edited)
    return config_of(f"text:{tmp_path / 'near'}"), texts + edited


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_near_duplicates_are_those_of_a_brute_force_search(tmp_path, copies, tokenizer):
    config, texts = copies
    config = dataclasses.replace(config, tokenizer=tokenizer)
    train, held_out = by_split(texts)
    near = brute_force(train, held_out)
    assert len(near) > 10
    kept, dropped = config, dataclasses.replace(config, near_duplicates="drop")
    for c in (kept, dropped):
        data.prepare(c, tmp_path / "cache")
    before, after = (data.open(c, tmp_path / "cache") for c in (kept, dropped))
    found, left = (data.leakage(data.folder_of(c, tmp_path / "cache")) for c in (kept, dropped))
    assert found["near_duplicates"]["train_documents"] == len(near)
    assert found["exact_duplicates"] == left["near_duplicates"]["train_documents"] == 0
    assert left["removed"]["near_duplicates_from_train"] == len(near)
    assert after.describe()["num_near_duplicates_removed"] == len(near)
    assert after.arrays["validation"].tobytes() == before.arrays["validation"].tobytes()
    if tokenizer == "bytes":
        found = after.arrays["train"].tobytes().decode().split("\0")[1:]
        assert found == [t for i, t in enumerate(train) if i not in near]


def test_minhash_misses_a_pair_at_the_threshold_as_rarely_as_it_says():
    rows = duplicates._NUM_PERM // duplicates._NUM_BANDS
    assert (1 - duplicates.JACCARD**rows) ** duplicates._NUM_BANDS == pytest.approx(5e-8, rel=0.1)


# --- Subsets ---------------------------------------------------------------------------------------------------------


def test_subsets_are_nested_and_in_order_of_hash(tmp_path, config):
    lines = [line for i in range(3) for line in (tmp_path / "texts" / f"{i}.jsonl").read_text().splitlines()]
    texts = [json.loads(line)["text"] for line in lines]
    train, _ = by_split(texts)
    stream = b"".join(b"\0" + t.encode() for t in sorted(train, key=lambda t: hashlib.sha256(t.encode()).digest()))
    for asked in (16, 1000, 5000, len(stream) - 1):
        config = dataclasses.replace(config, unique_tokens=asked)
        data.prepare(config, tmp_path / "cache")
        corpus = data.open(config, tmp_path / "cache")
        windows = asked // 16
        assert corpus.arrays["train"].tobytes() == stream[: windows * 16 + 1]
        assert corpus.train_tokens == windows * 16 == corpus.describe()["train_tokens"]
        epoch = np.concatenate([corpus.batch(step, 1, 3) for step in range(windows)])
        assert sorted(map(bytes, epoch[:, 1:].astype(np.uint8))) == sorted(
            stream[1 + 16 * w : 17 + 16 * w] for w in range(windows)
        )
    whole = dataclasses.replace(config, unique_tokens=None)
    assert data.open(whole, tmp_path / "cache").fingerprint == corpus.fingerprint
    np.testing.assert_array_equal(data.open(whole, tmp_path / "cache").validation()[0], corpus.validation()[0])


@pytest.mark.parametrize(
    "asked, says",
    [
        (15, r"^data.unique_tokens is 15: write at least one window, data.seq_len 16$"),
        (10**9, r"^data.unique_tokens is 1000000000: the train split of .* has \d+: write \d+ or less, or null"),
    ],
)
def test_subsets_that_cannot_be(tmp_path, config, asked, says):
    config = dataclasses.replace(config, unique_tokens=asked)
    data.prepare(config, tmp_path / "cache")
    with pytest.raises(ValueError, match=says):
        data.open(config, tmp_path / "cache")


# --- Mixtures --------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixture(tmp_path, small_parts) -> tuple[DataConfig, dict[str, list[str]]]:
    texts = {}
    for name, first in (("a", "α"), ("b", "β"), ("c", "γ")):
        texts[name] = [first * 40 + f" {i}" for i in range(200)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[name]))
    named = [f"{weight} * text:{tmp_path / name}" for weight, name in ((2, "a"), (1, "b"), (0.5, "c"))]
    return config_of(" + ".join(named)), texts


def test_a_mixture_gives_each_source_its_share_and_its_own_epochs(tmp_path, mixture):
    config, _ = mixture
    data.prepare(config, tmp_path / "cache")
    corpus = data.open(config, tmp_path / "cache")
    parts = [data.open(part, tmp_path / "cache") for _, part in sources.components(config)]
    rows = np.concatenate([corpus.batch(step, 50, 7) for step in range(40)])
    counts = (571, 286, 143)  # 1000 split 4 : 2 : 1 by largest remainder
    letters = [0xB1, 0xB2, 0xB3]  # the second bytes of α, β, γ
    source_of = np.argmax([[(row == letter).sum() for letter in letters] for row in rows], axis=1)
    for block in (source_of[:1000], source_of[1000:]):
        assert tuple(np.bincount(block)) == counts
    for i, part in enumerate(parts):
        own = rows[source_of == i]
        expected = part.windows(np.arange(2 * counts[i], dtype=np.uint64), 7)
        for block in range(2):
            span = slice(block * counts[i], (block + 1) * counts[i])
            assert sorted(map(bytes, own[span])) == sorted(map(bytes, expected[span]))
    hosts = [corpus.batch(13, 50, 7, slice(host, None, 4)) for host in range(4)]
    for host, rows in enumerate(hosts):
        np.testing.assert_array_equal(rows, corpus.batch(13, 50, 7)[host::4])


def test_a_mixture_is_described_and_validated_source_by_source(tmp_path, mixture):
    config, _ = mixture
    data.prepare(config, tmp_path / "cache")
    corpus = data.open(config, tmp_path / "cache")
    told = corpus.describe()
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert [s["weight"] for s in told["sources"]] == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert told["num_documents"] == 600
    x, weights = corpus.validation()
    assert weights.sum() == sum(s["validation_tokens"] - 1 for s in told["sources"])
    for share, part in zip(corpus.validation_shares(), sources.components(config)):
        alone = data.open(part[1], tmp_path / "cache").validation()
        np.testing.assert_array_equal(x[share[2]], alone[0])
        assert share[1] == part[0]
    few, few_weights = corpus.validation(700)
    assert sum(s[2].stop - s[2].start for s in corpus.validation_shares(700)) == len(few) == len(few_weights)


def test_a_mixture_shares_one_trained_tokenizer(tmp_path, mixture):
    config = dataclasses.replace(mixture[0], tokenizer="bpe:300")
    data.prepare(config, tmp_path / "cache")
    corpus = data.open(config, tmp_path / "cache")
    assert len({c.manifest["tokenizer"]["fingerprint"] for c in corpus.corpora}) == 1
    assert all(c.bytes_per_token["validation"] > 5 for c in corpus.corpora)  # it has seen all three alphabets


@pytest.mark.parametrize(
    "source, says",
    [
        ("1 * python-stdlib + text:x", "write a mixture as <weight> \\* <source>"),
        ("0 * python-stdlib + 1 * text:x", "weights above 0"),
        ("1 * text:x + 2 * text:x", "a source is there twice"),
        ("1 * python-stdlib + 1 * c4", "^data.source is 'c4': write python-stdlib"),
    ],
)
def test_misspelt_mixtures(tmp_path, source, says):
    with pytest.raises(ValueError, match=says):
        data.prepare(config_of(source), tmp_path)


def test_too_small_a_weight_is_refused(tmp_path, mixture):
    config = dataclasses.replace(mixture[0], source=mixture[0].source.replace("0.5 *", "0.0001 *"))
    data.prepare(config, tmp_path / "cache")
    with pytest.raises(ValueError, match="a weight below 1/1000"):
        data.open(config, tmp_path / "cache")


@pytest.fixture
def overlapping(tmp_path, small_parts) -> tuple[DataConfig, dict[str, list[str]]]:
    """Three sources; of every third document of one, the next has a copy with a word changed."""
    texts = {name: write_jsonl(tmp_path / name / "x.jsonl", 150, seed) for seed, name in enumerate("abc")}
    for name, other in zip("abc", "bca"):
        copies = []
        for i, text in enumerate(texts[name][::3]):
            words = text.split()
            words[i % len(words)] = "changed"
            copies.append(" ".join(words))
        texts[other] = texts[other] + copies
    for name, mine in texts.items():
        (tmp_path / name / "x.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in mine))
    source = " + ".join(f"1 * text:{tmp_path / name}" for name in "abc")
    return config_of(source, near_duplicates="drop"), texts


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_no_source_of_a_mixture_trains_on_what_another_holds_out(tmp_path, overlapping, tokenizer):
    config, texts = dataclasses.replace(overlapping[0], tokenizer=tokenizer), overlapping[1]
    told = []
    data.prepare(config, tmp_path / "cache", told.append)
    corpus = data.open(config, tmp_path / "cache")
    held_out = {name: by_split(mine)[1] for name, mine in texts.items()}
    total = 0
    for name, part in zip("abc", corpus.corpora):
        train = by_split(texts[name])[0]
        own = brute_force(train, held_out[name])
        across = brute_force(train, [t for other in "abc" if other != name for t in held_out[other]]) - own
        assert len(across) > 5
        total += len(across)
        assert part.describe()["num_near_duplicates_across_sources"] == len(across)
        assert part.describe()["num_near_duplicates_removed"] == len(own | across)
        if tokenizer == "bytes":
            kept = part.arrays["train"].tobytes().decode().split("\0")[1:]
            assert kept == [t for i, t in enumerate(train) if i not in own | across]
            assert part.arrays["validation"].tobytes().decode().split("\0")[1:] == held_out[name]
    described = corpus.describe()
    assert described["num_near_duplicates_across_sources"] == total
    folders = [folder for *_, folder in data.folders_of(config, tmp_path / "cache")]
    assert [row["train_documents"] for row in data.leakage_across(folders)] == [0] * 6
    assert sum("are near what" in line for line in told) == 6


@pytest.mark.slow
def test_what_leaks_across_the_sources_of_a_mixture_is_counted(tmp_path, overlapping):
    config, texts = dataclasses.replace(overlapping[0], near_duplicates="keep"), overlapping[1]
    data.prepare(config, tmp_path / "cache")
    rows = data.leakage_across([folder for *_, folder in data.folders_of(config, tmp_path / "cache")])
    assert len(rows) == 6
    for row in rows:
        train, other = (by_split(texts[Path(row[split]).name])[i] for i, split in enumerate(("train", "validation")))
        assert row["train_documents"] == len(brute_force(train, other))
        assert row["validation_documents"] == len(brute_force(other, train))


def test_a_source_is_held_against_a_mixture_beside_its_own_folder(tmp_path, overlapping, monkeypatch):
    """Weights and order make no other folder; the source alone keeps what it has; what did not change is a link."""
    config, _ = overlapping
    folders = data.prepare(config, tmp_path / "cache")
    alone = [data.folder_of(part, tmp_path / "cache") for _, part in sources.components(config)]
    before = {folder: shards.read_manifest(folder)["fingerprint"] for folder in alone}
    terms = config.source.split(" + ")
    other_way = dataclasses.replace(config, source=" + ".join(["3" + terms[2][1:], *terms[:2]]))
    assert not data.is_prepared(dataclasses.replace(config, source=" + ".join(terms[:2])), tmp_path / "cache")
    assert data.is_prepared(other_way, tmp_path / "cache")
    assert sorted(data.prepare(other_way, tmp_path / "cache")) == sorted(folders)
    assert all(shards.read_manifest(folder)["fingerprint"] == mine for folder, mine in before.items())
    for mixed, mine in zip(folders, alone):
        assert mixed != mine
        for path in mine.glob("validation-*"):
            assert (mixed / path.name).samefile(path)
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix in (".work", ".tmp")]
    for folder in alone:  # not wanted again once the mixture's are there
        shutil.rmtree(folder)
    assert data.prepare(config, tmp_path / "cache") == folders

    def refuse(*paths):
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    copied = data.prepare(config, tmp_path / "no_links")
    assert [shards.read_manifest(a) for a in copied] == [shards.read_manifest(b) for b in folders]


def test_killed_while_sources_are_held_against_each_other(tmp_path, overlapping):
    config, _ = overlapping
    clean = data.prepare(config, tmp_path / "clean")

    class Killed(BaseException):
        pass

    def kill(line):
        if "are near what" in line:
            raise Killed

    with pytest.raises(Killed):
        data.prepare(config, tmp_path / "cache", kill)
    with pytest.raises(ValueError, match="no tokens prepared for it"):
        data.open(config, tmp_path / "cache")
    work = tmp_path / "cache" / f".{clean[0].name}.work"
    work.mkdir(exist_ok=True)  # what kill -9 leaves
    (work / "train-00000.bin").write_bytes(b"half")
    folders = data.prepare(config, tmp_path / "cache")
    fingerprints = [[shards.read_manifest(f)["fingerprint"] for f in every] for every in (clean, folders)]
    assert fingerprints[0] == fingerprints[1]
    assert not work.exists()


def test_a_source_that_others_hold_out_whole_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    text = " ".join(rng.choice(WORDS, 400))
    variants = [text + f" end{i}" for i in range(40)]
    train, held_out = by_split(variants)
    for name, mine in (("a", train[:-1]), ("b", held_out)):
        other = write_jsonl(tmp_path / name / "y.jsonl", 60, seed=len(name) + (name == "b"))
        kept = by_split(other)[1 if name == "a" else 0]
        (tmp_path / name / "y.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in mine + kept))
    source = f"1 * text:{tmp_path / 'a'} + 1 * text:{tmp_path / 'b'}"
    with pytest.raises(ValueError, match=r"every train document of text:.*a is near one that another source"):
        data.prepare(config_of(source, near_duplicates="drop"), tmp_path / "cache")
