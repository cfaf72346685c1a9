"""Whose kernels a compiled GPU program calls: products, attention, and what was built of it; read from its text."""

import re
from collections import Counter

# Of an instruction, what names its generator or library in XLA's text → what it is called here.
_KINDS = {
    "__triton_gemm": "triton products",
    "__triton_nested_gemm_fusion": "triton products",
    "__cublas$gemm": "cublas products",
    "__cublas$lt$matmul": "cublas products",
    "__cudnn$fmhaSoftmax": "cudnn attention, forward",
    "__cudnn$fmhaScaleBiasSoftmax": "cudnn attention, forward",
    "__cudnn$fmhaSoftmaxBackward": "cudnn attention, backward",
    "__cudnn$fmhaScaleBiasSoftmaxBackward": "cudnn attention, backward",
    "__gpu$xla.gpu.triton": "pallas kernels",
}
_NOT_BUILT = "cudnn attention, its workspace unknown"


def of(hlo: str) -> dict[str, int]:
    """Counts the instructions of an optimised program that go to each; empty for what is no GPU's.

    A loop's body counts once. Attention whose graph cuDNN has not built has no workspace in the text.
    """
    found: Counter[str] = Counter()
    for line in hlo.splitlines():
        match = re.search(r'"kind":"(__[\w$]+)"|custom_call_target="([^"]+)"', line)
        if match and (kind := _KINDS.get(match[1] or match[2])):
            found[kind] += 1
            found[_NOT_BUILT] += "attention" in kind and '"workspace_size":"0"' in line.replace(" ", "")
    return {kind: count for kind, count in sorted(found.items()) if count}


def said(kernels: dict[str, int]) -> str:
    """One line of what ``of`` counted; empty for none."""
    if not kernels:
        return ""
    libraries = (("triton products", "Triton"), ("cublas products", "cuBLAS"))
    products = [f"{kernels[kind]} by {name}" for kind, name in libraries if kind in kernels]
    forward, backward = (kernels.get(f"cudnn attention, {way}", 0) for way in ("forward", "backward"))
    fused = f"by cuDNN, {forward} forward, {backward} backward" if forward or backward else "without a fused kernel"
    if _NOT_BUILT in kernels:
        fused += " (chosen, its workspace 0 in the program: without a GPU its graph is not built)"
    pallas = f"; {kernels['pallas kernels']} by Pallas" if "pallas kernels" in kernels else ""
    return f"products {', '.join(products) or 'in loops alone'}, chosen without timing them; attention {fused}{pallas}"
