"""Where commands print: text of users (paths, labels, sources, messages of others) is printed as it is.

rich reads ``[…]`` in a plain string as a style and ``:name:`` as an emoji, so that a path may raise or print as
another. Here neither is read, in lines, in cells of tables or in titles; what has a style is a ``rich.text.Text``.
"""

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


def text(*parts: str | tuple[str, str]) -> Text:
    """Returns one text of ``parts``, each a string as it is or (string, style).

    What rich would read in a string even where a console reads none (a spinner's) is safe as such a text."""
    return Text.assemble(*parts)
