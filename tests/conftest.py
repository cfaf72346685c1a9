"""Eight virtual CPU devices, strict shapes, one thread for small matrices: set before any test imports JAX or NumPy."""

import importlib.metadata
import os

XLA_FLAGS = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
# Tests mostly compile, and XLA's former emitters of fusions take half as long over it: tests/training in 87 s for 130.
# A flag that XLA does not know ends the process, so only where it was tried; elsewhere the tests are slower, no more.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    XLA_FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(XLA_FLAGS).strip()
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
# There is a test process on every core. OpenBLAS's threads wait for each other by spinning: over the matrices of a few
# rows that fits are made of, two of them take ten times the processor's time of one, and the time of other tests.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
