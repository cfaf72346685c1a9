"""Eight virtual CPU devices, programs that compile fast, strict shapes, one thread for small matrices: set before any
test imports JAX or NumPy."""

import os

from tests.xla import COMPILES_FAST

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    [COMPILES_FAST, os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
)
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
# There is a test process on every core. OpenBLAS's threads wait for each other by spinning: over the matrices of a few
# rows that fits are made of, two of them take ten times the processor's time of one, and the time of other tests.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
