"""Bad input, as the command says it: one line, exit code 2."""

import contextlib
from collections.abc import Iterator


class BadInputError(Exception):
    """One line: what is wrong with what the person gave, and what to write instead."""


@contextlib.contextmanager
def bad_input() -> Iterator[None]:
    """ValueErrors are the person's to mend here: they say in one line what to write instead."""
    try:
        yield
    except ValueError as e:
        raise BadInputError(str(e)) from None
