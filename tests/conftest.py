"""Eight virtual CPU devices, strict shapes: set before any test imports JAX."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
