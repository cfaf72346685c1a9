"""The page of a sweep that still runs, written as cells end and served on the loopback address."""

import dataclasses
import http.client
import json
import os
import threading
import time

import pytest
from rich.console import Console

from scaling import conclusion, records
from scaling.report import __main__ as report
from scaling.report import page, provisional, serving, words
from tests import synthetic


@pytest.fixture
def half(tmp_path):
    """A folder in which twelve of 25 cells are in, one of them diverged. (folder, all runs)"""
    runs = synthetic.sweep_records()
    records.write_json(tmp_path / "sweep.json", synthetic.manifest(runs))
    for run in [*runs[:11], runs[-1]]:
        records.save(tmp_path, run)
    return tmp_path, runs


def test_a_page_of_half_a_sweep_says_what_it_lacks(half):
    folder, runs = half
    path = provisional.build(folder)
    html = path.read_text(encoding="utf-8")
    assert words.is_provisional(path)
    assert "Provisional: written while the sweep runs" in html
    assert "13 cells are not run yet" in html
    assert "11 of 25" in html
    assert all(run.run_id in html for run in runs), "those not run too"
    assert "Ask the law" in html
    assert not (folder / "fit.json").exists()
    assert not (folder / "figures").exists()


@pytest.mark.slow
def test_groups_with_laws_of_their_own_stand_side_by_side_before_they_are_whole(half):
    folder, runs = half
    manifest = json.loads((folder / "sweep.json").read_text())
    groups = {"half=a": [run.run_id for run in runs[:9]], "half=b": [run.run_id for run in runs[9:]]}
    records.write_json(folder / "sweep.json", manifest | {"groups": groups})
    path = provisional.build(folder)
    html = path.read_text(encoding="utf-8")
    assert words.is_provisional(path)
    assert "Groups side by side" in html
    assert html.count("<h2>half=") == 2
    assert "half=a/report.html" not in html
    assert not (folder / "half=a").exists()
    known = tuple(provisional._groups(folder, records.load_records(folder), manifest | {"groups": groups}))
    assert known[0].fit["laws"]["chinchilla"]["num_observations"] == 9
    assert "error" in known[1].fit, "two runs and one that diverged have no law"


def test_too_few_runs_have_no_law_and_say_so(half):
    folder, runs = half
    for run in runs[2:]:
        records.path_of(folder, run.run_id).unlink(missing_ok=True)
    html = provisional.build(folder).read_text(encoding="utf-8")
    assert "No laws:" in html
    assert "Ask the law" not in html


def test_a_whole_page_is_not_provisional(half):
    folder, _ = half
    known = page.read(folder)
    page.write(known, folder / "report.html", saved=())
    assert not words.is_provisional(folder / "report.html")


def test_a_listener_writes_seldom_and_never_stops_training(half, monkeypatch):
    folder, _ = half
    written = []
    monkeypatch.setattr(provisional, "build", written.append)
    watch = conclusion.Watch(folder, Console())
    watch({"event": "cell"})
    watch.end()
    assert not written, "a short sweep has its page soon anyway"
    watch._next, begun = 0.0, time.monotonic()
    for event in ("tick", "cell"):
        watch({"event": event})
        watch.end()
    assert written == [folder]
    assert watch._next > begun

    def fails(_):
        raise RuntimeError("no room")

    monkeypatch.setattr(provisional, "build", fails)
    watch._next = 0.0
    for _ in range(2):
        watch({"event": "cell"})
        watch.end()
    assert watch._next == float("inf")


def ask(server, path, host=None):
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=30)
    connection.request("GET", path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, body


@pytest.mark.slow
def test_the_page_is_served_here_alone_and_anew_when_a_cell_ends(half):
    folder, runs = half
    server = serving.Server(folder, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert server.server_address[0] == "127.0.0.1"
        status, html = ask(server, "/")
        _, version = ask(server, "/version")
        assert status == 200
        assert version in html
        assert runs[12].run_id in html
        assert ask(server, f"/runs/{runs[0].run_id}.json")[1] == records.path_of(folder, runs[0].run_id).read_text()
        for path in ("/sweep.json", "/runs/../sweep.json", "/runs/", "/../secret", "/runs/000000000000.json"):
            assert ask(server, path)[0] == 404
        assert ask(server, "/", host="elsewhere.example")[0] == 403
        records.save(folder, runs[12])
        later = time.time_ns() + 10**9
        os.utime(folder / "runs", ns=(later, later))
        server._next = 0.0
        assert ask(server, "/version")[1] != version
        assert "12 of 25" in ask(server, "/")[1]
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    "arguments, says",
    [(["--port", "80"], "--port is of --serve"), (["--serve", "--out", "x.html"], "without --out")],
)
def test_bad_options_are_one_line(half, capsys, arguments, says):
    assert report.main([str(half[0]), *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_taken_port_is_said(half, capsys):
    server = serving.Server(half[0], 0)
    try:
        assert report.main([str(half[0]), "--serve", "--port", str(server.server_address[1])]) == 2
    finally:
        server.server_close()
    assert "write another" in capsys.readouterr().err
    assert json.loads((half[0] / "sweep.json").read_text())["name"] == "synthetic"


@pytest.mark.parametrize("stopped, running", [({"reason": "narrow"}, False), (None, True)])
def test_cells_that_nobody_buys_are_not_waited_for(half, stopped, running):
    folder, _ = half
    known = page.read(folder)
    done = [{"run_id": run.run_id, "status": "completed"} for run in known.runs]
    cells = [*done, {"run_id": "0" * 12, "status": "candidate"}, {"run_id": "1" * 12, "status": "dropped"}]
    manifest = {"cells": cells, "design": {"rounds": [], "stopped": stopped}}
    assert provisional.is_running(dataclasses.replace(known, manifest=manifest)) is running
    assert not provisional.is_running(dataclasses.replace(known, manifest={"cells": done}))
    assert provisional.is_running(dataclasses.replace(known, manifest={"cells": [*done, {"run_id": "2" * 12}]}))
