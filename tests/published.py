"""Where published data for tests are found: they are not this project's to ship."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def path(name: str) -> Path:
    """A published CSV: in $SCALING_PUBLISHED, else in ../shared/published beside the repository; skips without."""
    folders = [Path(os.environ["SCALING_PUBLISHED"])] if "SCALING_PUBLISHED" in os.environ else []
    for folder in [*folders, ROOT.parent / "shared" / "published"]:
        if (folder / name).exists():
            return folder / name
    pytest.skip(f"published data {name} not found: set SCALING_PUBLISHED to the folder that holds it")


def table(name: str):
    """A published CSV as a pandas table."""
    import pandas as pd

    return pd.read_csv(path(name), comment="#")
