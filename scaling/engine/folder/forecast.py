"""The forecast of held-out cells, sealed before they train on: what it was made from, and its hash."""

import datetime
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from scaling import records, storage


def _digest(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes() if path.exists() else b"").digest()


def digest(paths: Sequence[Path], options: str) -> str:
    """sha256 over the contents of files (absent ones count as empty) and a text."""
    whole = hashlib.sha256(options.encode())
    for part in storage.each(_digest, paths):
        whole.update(part)
    return whole.hexdigest()


class Forecast:
    """``forecast.json``: what was said of each held-out cell before it trained, and a sha256 of all that.

    An entry, once written, is never changed; entries of cells that a grid gains later are added beside it.
    """

    def __init__(self, results: Path):
        self.path = results / "forecast.json"
        try:
            self._payload = dict(json.loads(self.path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            self._payload = {}
        except ValueError as e:
            raise ValueError(f"{self.path}: not readable as JSON ({e}): restore it from git, or delete it") from None

    @property
    def entries(self) -> list[dict]:
        return self._payload.get("cells", [])

    @property
    def is_intact(self) -> bool:
        """Whether the file is as it was written."""
        return not self._payload or self._payload.get("sha256") == records.seal(self._payload)

    def add(self, entries: Sequence[dict], fitted_run_ids: Sequence[str]) -> None:
        """Adds entries (run_id, flops, num_params, num_tokens, predicted, interval, level) and writes the file; each
        says what it was fitted on.

        Raises ValueError if the file was edited: adding to it would seal the edit.
        """
        if not self.is_intact:
            raise ValueError(f"{self.path}: does not match its own sha256: restore it from git, or delete it")
        written = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        payload = {
            "schema": 1,
            "written": written,
            "fitted_run_ids": sorted(fitted_run_ids),  # of the newest entries; older ones keep their own
            "cells": [
                *self.entries,
                *({**entry, "written": written, "fitted_run_ids": sorted(fitted_run_ids)} for entry in entries),
            ],
        }
        self._payload = {**payload, "sha256": records.seal(payload)}
        records.write_json(self.path, self._payload)
