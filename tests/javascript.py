"""Runs the page's own scripts under Node; skips with the reason without it."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

import scaling.report

FOLDER = Path(scaling.report.__file__).parent


def value_of(expression: str, given: object, *scripts: str) -> object:
    """The value of an expression of ``given`` after the scripts of scaling/report."""
    node = shutil.which("node") or shutil.which("nodejs")
    if node is None:
        pytest.skip("no Node here to run the page's scripts with")
    source = "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in scripts)
    # Infinity is no JSON.
    write = "(_, v) => typeof v === 'number' && !Number.isFinite(v) ? String(v) : v"
    code = f"{source}\nconst given = {json.dumps(given)};\nconsole.log(JSON.stringify({expression}, {write}));"
    done = subprocess.run([node, "-"], input=code, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
