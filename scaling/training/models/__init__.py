"""Model families. Each is a module with ``init``, ``apply`` and ``param_specs``: config → pure functions."""
