"""Where commands print: text of users (paths, labels, sources, messages of others) is printed as it is.

rich reads ``[…]`` in a plain string as a style and ``:name:`` as an emoji, so that a path may raise or print as
another. Here neither is read, in lines, in cells of tables or in titles; what has a style is a ``rich.text.Text``.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text


def console(stream, *, width: int = 140, fold: bool = True) -> Console:
    """Returns a console for ``stream`` that reads neither markup nor emoji; ``width`` is that of tables where the
    stream is no terminal: there lines are not folded to a guessed width. ``fold``: whether they are on a terminal."""
    terminal = stream.isatty()
    return Console(
        file=stream, width=None if terminal else width, markup=False, emoji=False, highlight=False,
        soft_wrap=not (terminal and fold),
    )  # fmt: skip


class _Stream:
    """A stream that goes on in silence when nobody reads it any more."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def _try(self, do, *args):
        try:
            return do(*args)
        except BrokenPipeError:
            # So that neither a library nor Python's own last flush meets the closed pipe again.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            return None

    def write(self, content: str):
        return self._try(self._stream.write, content)

    def flush(self):
        return self._try(self._stream.flush)


@contextmanager
def outliving_its_reader() -> Iterator[None]:
    """While it lasts, a reader that closes what this process prints (``| head``) ends the printing, not the work."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_Stream, before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = before


def text(*parts: str | Text | tuple[str, str]) -> Text:
    """Returns one text of ``parts``, each a string as it is or (string, style).

    What rich would read in a string even where a console reads none (a spinner's) is safe as such a text."""
    return Text.assemble(*parts)
