"""From a grid of language-model runs to scaling laws with honest intervals."""


def __getattr__(name: str):
    # Lazy: importing the package costs nothing, and analysis never pulls in training.
    if name == "fit_law":
        from scaling.fit import fit_law

        return fit_law
    raise AttributeError(f"module 'scaling' has no attribute {name!r}")
