"""Eight virtual CPU devices, strict shapes, one thread for small matrices: set before any test imports JAX or NumPy."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
# There is a test process on every core. OpenBLAS's threads wait for each other by spinning: over the matrices of a few
# rows that fits are made of, two of them take ten times the processor's time of one, and the time of other tests.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
