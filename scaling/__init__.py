"""From a grid of language-model runs to scaling laws with honest intervals."""


def __getattr__(name: str):
    # Lazy: importing the package costs nothing, and analysis never pulls in training.
    if name in ("fit_law", "compare"):
        from scaling import fit

        return getattr(fit, name)
    raise AttributeError(f"module 'scaling' has no attribute {name!r}")
