"""What users wrote is printed as they wrote it: nothing of it is read as a style or an emoji."""

import ast
import io
import json
import types
from pathlib import Path

import pandas as pd
import pytest
from rich.table import Table

from scaling import fit, sweep, terminal
from scaling.data import __main__ as data
from scaling.report.printed import show

ROOT = Path(__file__).parents[1]
HOSTILE = ("[/b]", "[red]a[/]", ":one:", "a:smile:b", "[link=x]y", r"\[b]", "[/]", "[bold")
USED = "[/b] :one: [red]x[/] \\[b]"


def printed(show, is_terminal=False):
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    show(terminal.console(stream))
    return stream.getvalue()


@pytest.mark.parametrize("said", HOSTILE)
def test_lines_cells_and_titles_are_as_they_were_written(said):
    def show(console):
        table = Table(said, title=f"{said} of a title", show_footer=True)
        table.add_column(said, footer=said)
        table.add_row(said, terminal.text(said, (said, "red")))
        console.print(table)
        console.print(said)
        console.print(terminal.text((said, "bold"), said))

    assert printed(show).count(said) == 4 + 3 + 3


@pytest.mark.parametrize("said", HOSTILE)
def test_a_spinner_says_what_it_is_told(said, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")

    def show(console):
        console._force_terminal = True
        with console.status(terminal.text("")) as shown:
            shown.update(terminal.text(said))
            console.print(shown.renderable)

    assert said in printed(show, is_terminal=True)


@pytest.mark.slow
def test_no_other_module_has_a_console_or_writes_markup():
    """Read from the source: ``Console(`` is in one module, and no escape of rich's and no ``[style]`` in any."""
    for path in (ROOT / "scaling").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Console":
                assert path.name == "terminal.py", path
            if isinstance(node, ast.ImportFrom):
                assert node.module != "rich.markup", path
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and path.name != "terminal.py":
                assert not any(f"[{style}]" in node.value for style in ("/", "red", "yellow", "green", "bold")), path


def test_a_fit_prints_its_source_its_laws_and_its_warnings_as_they_are(tmp_path, capsys):
    folder = tmp_path / USED.replace("/", "")
    folder.mkdir()
    source = folder / "runs [b] :one:.csv"
    rows = [(n, d, 1.7 + 400 * n**-0.34 + 410 * d**-0.28) for n in (1e6, 4e6, 2e7, 9e7) for d in (2e7, 2e8, 1e9)]
    pd.DataFrame(rows, columns=["num_params", "num_tokens", "loss"]).to_csv(source, index=False)
    assert fit.main([str(source), "--law", "chinchilla", "--no-figures"]) == 0
    out = capsys.readouterr().out
    assert f"{source}: 12 runs fitted" in out
    assert f"written: {folder / 'fit.json'}" in out
    payload = json.loads((folder / "fit.json").read_text())
    entry = payload["laws"]["chinchilla"]
    payload |= {"source": USED, "warnings": [f"w {USED}"], "notes": [f"n {USED}"], "laws": {f"law {USED}": entry}}
    payload["forecast"] = [{"run_id": f"r {USED}", "flops": 1e18, "predicted": 2.0, "interval": [1.9, 2.1]}]
    out = printed(lambda console: show(console, payload))
    for said in (f"{USED}: 12 runs", f"note w {USED}"[5:], f"note n {USED}", f"law {USED}: ", f"r {USED}"):
        assert said in out


def test_data_describes_a_source_by_its_name(capsys):
    data._show({"source": f"text:one: {USED}"}, [(f"name {USED}", f"value {USED}")])
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        f"text:one: {USED}", f"name {USED}  value {USED}", "",
    ]  # fmt: skip


def test_a_plan_names_grid_labels_and_warnings_as_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a:one:.yaml").write_text(
        "recipe: default@1\nbase: {model: {width: 8}, horizon: {tokens: 3000}}\n"
        f"axes:\n  bad:\n    - {{seed: 0, label: 'x {USED}'}}\n    - {{seed: 1, label: ':two: [/i]'}}\n"
    )
    assert sweep.main(["--grid", "a:one:.yaml", "--plan", "--hardware", "h100", "--mfu", "0.3"]) == 0
    out = capsys.readouterr().out
    assert "a:one:.yaml: the plan" in out
    assert f"x {USED}" in out
    assert ":two: [/i]" in out
    assert sweep.main(["--grid", "a:one:.yaml", "--status"]) == 0
    assert "2 cells: 0 completed, 0 running, 2 waiting" in capsys.readouterr().out


def test_a_failure_is_said_as_it_was(capsys):
    from scaling.engine.run import status

    record = types.SimpleNamespace(status="failed", environment={"failure": USED})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(status.records, "read", lambda path: record)
        assert status._ending(Path("r"), "id") == ("", USED)
