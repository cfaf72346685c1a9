"""Whether parameters, tokens and FLOPs are plausibly in ones: the likeliest unit where they are not."""

import numpy as np

# No language model has fewer parameters, nor was one trained on fewer tokens; a model of a thousand parameters on bytes
# is within, and so is what was ever published of D/N: .03 (Hoffmann et al. 2022) to 10^5 for small models.
MIN_PARAMS = 100
MIN_TOKENS = 1000
MAX_TINY = (1e4, 1e5)  # parameters and tokens: a table with none above both is not in ones
TOKENS_PER_PARAM = (0.01, 1e6)
# C/(6ND): a head of half of a small model's parameters, attention over long contexts and recomputation stay within.
COST_RATIO = (0.03, 30.0)
LETTERS = {"thousands": "k", "millions": "m", "billions": "b", "trillions": "t"}  # as a name carries it
UNITS = {1e3: "thousands", 1e6: "millions", 1e9: "billions", 1e12: "trillions"}
COST_UNITS = {
    8.64e19: "PF-days", 1e9: "GFLOP", 1e12: "TFLOP", 1e15: "PFLOP", 1e18: "EFLOP", 1e21: "ZFLOP",
    1e-3: "N or D in thousands", 1e-6: "N or D in millions", 1e-9: "N or D in billions",
    1e-12: "N and D in millions", 1e-18: "N and D in billions",
}  # fmt: skip
USUAL_RATIO = 20.0  # tokens per parameter, Hoffmann et al. 2022


def check(num_params: np.ndarray, num_tokens: np.ndarray, source: str, *, in_ones: bool = False) -> None:
    """Raises ValueError, naming the likeliest unit, on sizes that no run has.

    Args:
      num_params, num_tokens: of the rows that are fitted, any shape, in ones if the table is right.
      in_ones: the table says so itself (``num_params_ones``): a thousand parameters on 50,000 tokens are then no
        billions and millions, which without that word they would more likely be.
    """
    N, D = float(np.median(num_params)), float(np.median(num_tokens))
    ratio = num_tokens / num_params
    lo, hi = TOKENS_PER_PARAM
    tiny = not in_ones and num_params.max() < MAX_TINY[0] and num_tokens.max() < MAX_TINY[1]
    small = []
    if tiny or num_params.min() < MIN_PARAMS:
        small.append(("num_params", num_params))
    if tiny or num_tokens.min() < MIN_TOKENS:
        small.append(("num_tokens", num_tokens))
    if small:
        said = " and ".join(f"{name} is {x.min():.4g} to {x.max():.4g}" for name, x in small)
        units = [_unit(name, N, D) for name, _ in small]
        first = small[0][0]
        raise ValueError(
            f"{source}: {said}: in {' and '.join(dict.fromkeys(units))}? write numbers in ones (53300000, 53.3M), or "
            f"the unit in the name ({first}_{LETTERS[units[0]]}{f'; {first}_ones if so it is' if tiny else ''})"
        )
    if ratio.min() < lo or ratio.max() > hi:
        worst = ratio.max() if ratio.max() > hi else ratio.min()
        guess = "num_params" if worst > hi else "num_tokens"
        raise ValueError(
            f"{source}: num_tokens / num_params is {worst:.3g} and no run is beyond {lo:g} to {hi:g}: is {guess} in "
            f"{_unit(guess, N, D)}? write both in ones, or the unit in the name ({guess}_{LETTERS[_unit(guess, N, D)]})"
        )


def _unit(name: str, N: float, D: float) -> str:
    """The unit under which tokens per parameter come nearest to the usual; the size of a model decides for both."""
    if MAX_TINY[0] > N and MAX_TINY[1] > D:
        if name == "num_params":
            return "billions" if N < 50 else "millions"
        N *= 1e9 if N < 50 else 1e6
    off = {
        u: abs(np.log(D / (N * u) / USUAL_RATIO) if name == "num_params" else np.log(D * u / N / USUAL_RATIO))
        for u in UNITS
    }
    return UNITS[min(off, key=off.get)]  # type: ignore[arg-type]  # every key is there


def cost_note(num_params: np.ndarray, num_tokens: np.ndarray, flops: np.ndarray) -> str | None:
    """A note that names the likeliest unit where C/(6ND) lies beyond what any way of counting gives, else None.

    A head that dominates small models raises the ratio too, and less so for larger ones: it is no wrong unit.
    """
    ratio = flops / (6.0 * num_params * num_tokens)
    middle = float(np.exp(np.median(np.log(ratio))))
    lo, hi = COST_RATIO
    if lo <= middle <= hi:
        return None
    sizes = np.log(num_params)
    if middle > hi and (np.ptp(sizes) == 0 or np.polyfit(sizes, np.log(ratio), 1)[0] < -0.5):
        return None
    unit = min(COST_UNITS, key=lambda u: abs(np.log(middle * u)))
    guess = COST_UNITS[unit] if abs(np.log(middle * unit)) < np.log(hi) else None
    likely = f": is {'' if unit < 1 else 'flops in '}{guess}?" if guess else ""
    return f"C/(6ND) is {middle:.2g}, and {lo:g} to {hi:g} is what counting differently can give{likely} Write FLOPs"
