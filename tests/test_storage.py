"""Folders in a bucket: through fsspec's memory, as another backend of etils', and through a server of GCS's own API."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from scaling import fit, records, storage, sweep
from scaling.engine.folder import cells, lease, lock, signs
from scaling.report import __main__ as report
from scaling.report.page import build
from scaling.training import checkpoint
from tests import babble, gcs_server, synthetic

ROOT = Path(__file__).parent.parent


class Shelf(MemoryFileSystem):
    """fsspec's memory under a scheme that etils hands on."""

    protocol = "az"
    store: dict = {}
    pseudo_dirs = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(os.fspath(path).removeprefix("az://"))


fsspec.register_implementation("az", Shelf, clobber=True)


@pytest.fixture
def shelf():
    """A folder that is not on a disk."""
    Shelf.store.clear()
    return storage.folder("az://shelf/sweep")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.3)
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.05)


# ---- any bucket -----------------------------------------------------------------------------------------------------


def test_a_path_is_a_path_and_needs_no_etils():
    script = (
        "import sys; from scaling import records, storage; records.path_of('x', 'y'); print(type(storage.folder('x')))"
        "; assert not {'etils', 'fsspec'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout) == (0, f"{type(Path())}\n"), done.stderr


@pytest.mark.parametrize(
    "name, says",
    [
        ("nowhere://x", "nowhere://x: nowhere:// leads nowhere: write a path, or gs://bucket/folder"),
        ("gs:/bucket/x", "gs:/bucket/x: a folder in a bucket has two slashes: write gs://bucket/x"),
        (Path("gs://bucket/x"), "gs:/bucket/x: a folder in a bucket has two slashes: write gs://bucket/x"),
    ],
)
def test_what_is_no_folder_is_one_line(name, says):
    with pytest.raises(ValueError, match=f"^{re.escape(says)}$"):
        storage.folder(name)


def test_without_the_client_one_line_says_what_to_install(monkeypatch):
    def missing(scheme):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(ValueError, match=r"^gs://b/x: pip install 'scaling\[gcs\]' \(Please install gcsfs\)$"):
        storage.folder("gs://b/x")


def test_an_address_is_the_same_wherever_it_came_from(shelf):
    assert str(shelf / "runs") == "az://shelf/sweep/runs"
    assert storage.folder(str(shelf)) == storage.folder(shelf) == shelf
    assert storage.is_remote(shelf)
    assert not storage.is_remote(Path("a/b"))
    assert checkpoint.folder_of(shelf, "abc") == shelf / "checkpoints" / "abc"


def test_writing_leaves_the_whole_or_nothing_of_it(shelf, tmp_path):
    for home in (shelf, tmp_path):
        storage.write(home / "deep" / "a.txt", "first")
        storage.write(home / "deep" / "a.txt", "zweite Fassung: ä", synced=False)
        assert (home / "deep" / "a.txt").read_text(encoding="utf-8") == "zweite Fassung: ä"
        storage.write(home / "deep" / "b.bin", bytes(range(256)))
        assert (home / "deep" / "b.bin").read_bytes() == bytes(range(256))
        assert sorted(p.name for p in (home / "deep").iterdir()) == ["a.txt", "b.bin"]
        storage.set_aside(home / "deep" / "a.txt", "b.bin")
        assert [p.name for p in (home / "deep").iterdir()] == ["b.bin"]
        storage.set_aside(home / "deep", "else")
        storage.write(home / "deep" / "c", b"")
        storage.set_aside(home / "deep", "else")  # in place of the first
        assert [p.name for p in (home / "else").iterdir()] == ["c"]
        storage.remove_tree(home / "else")
        storage.remove_tree(home / "else")
        assert not (home / "else").exists()


def test_a_client_that_fails_is_an_os_error_with_the_address(shelf, monkeypatch):
    monkeypatch.setattr(Shelf, "open", lambda *_, **__: (_ for _ in ()).throw(TimeoutError("no answer\nfor long")))
    with pytest.raises(OSError, match=r"^az://shelf/sweep/a: TimeoutError: no answer$"):
        storage.write(shelf / "a", "x")


def both(*homes):
    """The same sweep in each."""
    runs = synthetic.sweep_records()
    for home in homes:
        for run in runs:
            records.save(home, run)
        records.write_json(home / "sweep.json", synthetic.manifest(runs))
    return runs


@pytest.mark.slow
def test_records_and_laws_are_those_of_a_disk(shelf, tmp_path):
    runs = both(shelf, tmp_path)
    assert records.load_records(shelf) == records.load_records(tmp_path) == sorted(runs, key=lambda r: r.run_id)
    assert records.load(shelf).equals(records.load(tmp_path))
    options = ["--law", "chinchilla", "--bootstrap", "0", "--no-figures"]
    assert fit.main([str(shelf), *options]) == fit.main([str(tmp_path), *options]) == 0
    mine, theirs = (json.loads((home / "fit.json").read_text(encoding="utf-8")) for home in (shelf, tmp_path))
    assert mine.pop("source") == str(shelf)
    assert theirs.pop("source") == str(tmp_path)
    assert mine == theirs


@pytest.mark.slow
def test_a_report_is_that_of_a_disk(shelf, tmp_path, capsys):
    both(shelf, tmp_path)
    for home in (shelf, tmp_path):
        assert fit.main([str(home), "--law", "chinchilla", "--bootstrap", "0", "--no-figures"]) == 0
    assert report.main([str(shelf)]) == 0
    capsys.readouterr()
    page = build(tmp_path)
    drawn, expected = ({p.name: p.read_bytes() for p in (home / "figures").iterdir()} for home in (shelf, tmp_path))
    assert len(expected) > 2
    assert drawn == expected
    assert len((shelf / "report.html").read_text()) == pytest.approx(len(page.read_text()), rel=0.01)


def test_a_damaged_record_is_set_aside(shelf):
    run = synthetic.sweep_records()[0]
    path = records.save(shelf, run)
    assert cells.statuses(shelf, [run.run_id, "absent"], set_aside=True) == ({run.run_id: "completed"}, [])
    storage.write(path, path.read_bytes()[:100])
    found, complaints = cells.statuses(shelf, [run.run_id], set_aside=True)
    assert found == {}
    assert complaints[0].startswith(f"{path}: not a readable run record")
    assert [p.name for p in path.parent.iterdir()] == [f"{path.name}.unreadable"]


def test_signs_of_life(shelf):
    with signs.Board(shelf, "local", {"k": ["a"]}) as board:
        board.on_event({"event": "start", "key": "k"})
        (sign,) = signs.read_signs(shelf)
        assert sign["alive"]
        assert sign["pid"] == os.getpid()
    assert signs.read_signs(shelf) == []


# ---- who has the folder ---------------------------------------------------------------------------------------------


def test_the_second_sweep_is_told_who_has_the_folder(shelf, quick):
    held = lease.hold(shelf, None)
    with pytest.raises(lock.HeldError, match=rf"az://shelf/sweep is held by another sweep: process {os.getpid()} on"):
        lease.hold(shelf, None)
    assert lock.holder(shelf)["pid"] == os.getpid()
    taken, deadline = lock.holder(shelf)["renewed"], time.monotonic() + 30
    while lock.holder(shelf)["renewed"] == taken:  # it is renewed without being asked
        assert time.monotonic() < deadline
        time.sleep(0.02)
    held.release()
    assert lock.holder(shelf) is None
    lease.hold(shelf, None).release()


def test_what_a_killed_sweep_held_is_free(shelf, quick):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = {"pid": dead.pid, "host": os.uname().nodename, "renewed": time.time()}  # this machine sees that it is gone
    away = {"pid": 1, "host": "another", "renewed": time.time() - lock.LEASE_SECONDS - 1}
    for left in (here, away):
        storage.write(shelf / ".lock", json.dumps({**left, "token": "x", "started": "then"}))
        assert lock.holder(shelf) is None
        lease.hold(shelf, None).release()
    storage.write(shelf / ".lock", json.dumps({**away, "renewed": time.time() - lock.LEASE_SECONDS + 20}))
    with pytest.raises(lock.HeldError, match="process 1 on another"):
        lease.hold(shelf, None)


def test_of_many_that_come_together_one_has_it(shelf, quick):
    together, got, refused = threading.Barrier(8), [], []

    def come():
        together.wait()
        try:
            got.append(lease.hold(shelf, None))
        except lock.HeldError:
            refused.append(1)

    threads = [threading.Thread(target=come) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert (len(got), len(refused)) == (1, 7)
    got[0].release()


def test_whoever_lost_it_while_suspended_is_stopped(shelf, quick, capsys):
    held = lease.hold(shelf, None)
    called = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: called.set())
    try:
        storage.write(shelf / ".lock", json.dumps({"pid": 7, "host": "b", "started": "now", "token": "theirs"}))
        for _ in range(100):  # the handler runs between two of these, never inside the event's own lock
            if called.is_set():
                break
            time.sleep(0.02)
        assert called.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
    held.release()
    assert json.loads((shelf / ".lock").read_text())["token"] == "theirs"
    assert "is held by another sweep: process 7 on b, since now" in capsys.readouterr().err


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--workdir", "az://x/y"], "--workdir az://x/y: checkpoints go to a disk or to gs://"),
        (["--results", "az://x/y", "--shard", "1/2"], "--shard 1/2: shards write sweep.json in turn"),
    ],
)
def test_what_a_bucket_cannot_do_is_refused(argv, says, capsys):
    assert sweep.main(["--grid", str(ROOT / "sweeps/smoke.yaml"), "--plan", *argv]) == 2
    assert says in capsys.readouterr().err


def test_prepared_data_stay_on_a_disk(monkeypatch, capsys):
    monkeypatch.setenv("SCALING_CACHE", "gs://bucket/data")
    assert sweep.main(["--grid", str(ROOT / "sweeps/smoke.yaml"), "--plan"]) == 2
    assert "SCALING_CACHE is gs://bucket/data" in capsys.readouterr().err


# ---- Google's, by its own clients -----------------------------------------------------------------------------------


@pytest.fixture
def bucket():
    pytest.importorskip("gcsfs", reason="gcsfs is not installed (extra gcs)")
    with gcs_server.running("bucket") as store:
        yield store


@pytest.mark.slow
def test_checkpoints_in_a_bucket(bucket):
    """By Orbax and TensorStore; the one that was cut off before its commit is none."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    workdir = storage.folder("gs://bucket/work")
    assert checkpoint.newest_step(workdir, "abc") == 0
    state = {"a": jnp.arange(1000.0), "b": {"c": jnp.ones((3, 4))}}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    saved = checkpoint.Checkpoints(checkpoint.folder_of(workdir, "abc"), 1000, 1e9)
    for step in (5, 7, 9, 11):
        saved.save(step, state, {"at": step})
    saved.close()
    assert checkpoint.newest_step(workdir, "abc") == 11
    del bucket.objects["bucket", "work/checkpoints/abc/11/commit_success.txt"]
    assert checkpoint.newest_step(workdir, "abc") == 9
    again = checkpoint.Checkpoints(checkpoint.folder_of(workdir, "abc"), 1000, 1e9)
    restored, host = again.restore(lambda host: abstract)
    assert host == {"at": 9}
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    again._set_aside(9, ValueError("not this one"))
    assert checkpoint.newest_step(workdir, "abc") == 7
    again.delete()
    assert bucket.names("bucket") == []


def test_a_bucket_that_is_not_there_or_not_ours_is_one_line(bucket, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    grid = str(ROOT / "sweeps/smoke.yaml")
    assert sweep.main(["--grid", grid, "--results", "gs://elsewhere/r"]) == 2
    says = r"error: --results gs://elsewhere/r: .*: write a folder that can be written to\n$"
    assert re.match(says, capsys.readouterr().err)
    bucket.refuse.append("^POST /upload")
    assert sweep.main(["--grid", grid, "--results", "gs://bucket/r"]) == 2
    assert re.match(r"error: --results gs://bucket/r: .*Forbidden.*: write a folder that", capsys.readouterr().err)
    assert fit.main(["gs://elsewhere/r"]) == 2
    assert report.main(["gs://elsewhere/r"]) == 2
    assert capsys.readouterr().err.count("\n") == 2


GRID = """
recipe: default@1
base:
  data: {source: "text:text", seq_len: 32, validation_fraction: 0.2}
  eval: {num_points: 5, curve_tokens: 1024}
isoflop: {sizes: [8, 16], budgets: [6e9, 2e10]}
fit: {bootstrap: 0}
execution: {checkpoint_seconds: 1.0}
"""


@pytest.mark.slow
def test_a_sweep_in_a_bucket_killed_and_gone_on_with_leaves_the_records_of_a_disk(bucket, tmp_path, monkeypatch):
    """Worker processes and all, each with clients of its own."""
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SCALING_CACHE", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", "")  # one device; of several, in several processes: test_distributed
    Path("g.yaml").write_text(GRID)
    babble.write("text")

    def start(*argv):
        command = [sys.executable, "-m", "scaling.sweep", "--grid", "g.yaml", "--workers", "1", *argv]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    remote = ("--results", "gs://bucket/results", "--workdir", "gs://bucket/work")
    process, deadline = start(*remote), time.monotonic() + 300
    while not any(re.search(r"/\d+/commit_success.txt$", name) for name in bucket.names("bucket")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert not Path("results").exists()
    for argv in (remote, ("--results", "r", "--workdir", "w")):
        process = start(*argv)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
    mine = records.load_records(storage.folder("gs://bucket/results"))
    theirs = records.load_records(Path("r"))
    assert [m.loss for m in mine] == [t.loss for t in theirs]
    assert [m.curve for m in mine] == [t.curve for t in theirs]
    left = bucket.names("bucket")
    assert not any(name.startswith("work/checkpoints") for name in left)
    assert "results/.lock" not in left
    assert {"results/fit.json", "results/sweep.json", "results/report.html"} <= set(left)


def test_trimming_leaves_what_was_used_last(tmp_path):
    for i in range(5):
        (tmp_path / str(i)).write_bytes(bytes(100))
        os.utime(tmp_path / str(i), (1000 + i, 1000 + i))
    os.utime(tmp_path / "0", (2000, 1000))  # read since
    storage.trim(tmp_path, 250)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "4"]
    storage.trim(tmp_path / "none", 1)
