"""From a grid of language-model runs to scaling laws with honest intervals."""

import importlib

# Lazy: importing the package costs nothing, and analysis never pulls in training.
_HOMES = {
    "open": "scaling.study",
    "advise": "scaling.advise",
    "design": "scaling.design",
    "fit_law": "scaling.fit",
    "compare": "scaling.fit",
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'scaling' has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name])
    return home if home.__name__ == f"{__name__}.{name}" else getattr(home, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
