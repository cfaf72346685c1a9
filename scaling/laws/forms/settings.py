"""Laws of more than size and data: learning rate and batch, vocabulary, parallel streams, repeated tokens.

They are forms of the catalogue like its others. ``any_columns`` builds laws for columns that no paper has a law of.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from scaling.laws.forms.law import Form, Parameter, PowerSum, amplitude, exponent, law, offset, positive, real

# Where a multi-start looks for exponents that the literature puts between a tenth and one, and for those of either
# sign: the place of an optimum moves with size and data by powers between -.7 and .6 (Step Law, eq. 1).
SLOPES = (0.15, 0.4, 0.8)
# Those of size: .34 of Hoffmann et al. 2022, .35 of Muennighoff et al. 2023, .26 to .33 of Gemstones, and half as much
# again either way.
SIZE_SLOPES = (0.2, 0.3, 0.45)
MOVES = (-0.5, 0.0, 0.5)
# Learning rates and batches are tried over factors of two: an optimum is sought about the middle of what was tried.
PLACES = (-1.0, 0.0, 1.0)


def place(column: str, *of: str | float) -> Parameter:
    """c of an optimum c x^-α y^-β in ``column``: ``place("peak_lr", "alpha", "x", "beta", "y")``; positive.

    It is fitted as the logarithm of the optimum's place at the data's centre over the column's own centre.
    """
    powers = tuple(zip(of[::2], of[1::2]))
    return Parameter("place", lower=0.0, unit=column, starts=PLACES, of=((1.0, column), *powers))  # type: ignore[arg-type]  # exponent, column


def move() -> Parameter:
    """The power by which an optimum moves with a column; of either sign."""
    return real(*MOVES, lower=-3.0, upper=3.0)


def floor() -> Parameter:
    """The value that no column takes away, of a quantity that may be negative."""
    return Parameter(linear=True)


def _valleys(columns: tuple[Any, ...], p: Mapping[str, Any]) -> tuple[Any, ...]:
    """(log distance from the best rate, from the best batch; their valleys over tokens^-s and tokens^-t; the logs)."""
    log_n, log_d, log_lr, log_batch = (np.log(x) for x in columns)
    off_lr = log_lr - np.log(p["c_lr"]) + p["a"] * log_n - p["b"] * log_d - p.get("g", 0.0) * log_batch
    off_batch = log_batch - np.log(p["c_batch"]) - p["d"] * log_d
    wide_lr = p["k_lr"] * np.exp(-p.get("s", 0.0) * log_d)
    wide_batch = p["k_batch"] * np.exp(-p.get("t", 0.0) * log_d)
    return off_lr, off_batch, wide_lr, wide_batch, (log_n, log_d, log_batch)


def _valley_gradient(num_params, num_tokens, peak_lr, batch_size, **p):
    """Of both laws with valleys: ∂ loss / ∂ each of their parameters."""
    columns = (num_params, num_tokens, peak_lr, batch_size)
    off_lr, off_batch, wide_lr, wide_batch, (log_n, log_d, log_batch) = _valleys(columns, p)
    size, data = np.exp(-p["alpha"] * log_n), np.exp(-p["beta"] * log_d)
    by_lr, by_batch = 2 * wide_lr * off_lr, 2 * wide_batch * off_batch
    out = {
        "E": np.ones_like(size * data), "A": size, "alpha": -p["A"] * size * log_n, "B": data,
        "beta": -p["B"] * data * log_d, "k_lr": wide_lr * off_lr**2 / p["k_lr"], "c_lr": -by_lr / p["c_lr"],
        "a": by_lr * log_n, "b": -by_lr * log_d, "k_batch": wide_batch * off_batch**2 / p["k_batch"],
        "c_batch": -by_batch / p["c_batch"], "d": -by_batch * log_d, "g": -by_lr * log_batch,
        "s": -wide_lr * off_lr**2 * log_d, "t": -wide_batch * off_batch**2 * log_d,
    }  # fmt: skip
    return {name: out[name] for name in p}


@law(
    "Li et al. 2025 (Step Law, arXiv 2503.04715), eq. 1 and the convex landscape about it; the parabola is inferred",
    gradient=_valley_gradient,
    E=offset(),
    A=amplitude("alpha", "num_params"),
    alpha=exponent(*SIZE_SLOPES),
    B=amplitude("beta", "num_tokens"),
    beta=exponent(*SLOPES),
    k_lr=amplitude(),
    c_lr=place("peak_lr", "a", "num_params", "-b", "num_tokens"),
    a=move(),
    b=move(),
    k_batch=amplitude(),
    c_batch=place("batch_size", "-d", "num_tokens"),
    d=move(),
)
def lr_batch_valley(
    num_params, num_tokens, peak_lr, batch_size, *, E, A, alpha, B, beta, k_lr, c_lr, a, b, k_batch, c_batch, d
):
    """L = E + A N^-α + B D^-β + k_η log²(η / (c_η N^-a D^b)) + k_B log²(batch / (c_B D^d))

    Step Law states where the best learning rate and batch are, c_η N^-a D^b and c_B D^d, and that the loss is convex
    about them with a broad minimum; the squared logarithm of the distance is the plainest such landscape.
    """
    p = {"k_lr": k_lr, "c_lr": c_lr, "a": a, "b": b, "k_batch": k_batch, "c_batch": c_batch, "d": d}
    off_lr, off_batch, *_ = _valleys((num_params, num_tokens, peak_lr, batch_size), p)
    return E + A * num_params**-alpha + B * num_tokens**-beta + k_lr * off_lr**2 + k_batch * off_batch**2


@law(
    "Li et al. 2026 (arXiv 2604.22753), the power-law valleys of the lr&bsz task, without its products of logs",
    gradient=_valley_gradient,
    E=offset(),
    A=amplitude("alpha", "num_params"),
    alpha=exponent(*SIZE_SLOPES),
    B=amplitude("beta", "num_tokens"),
    beta=exponent(*SLOPES),
    k_lr=amplitude("s", "num_tokens"),
    s=move(),
    c_lr=place("peak_lr", "a", "num_params", "-b", "num_tokens", "-g", "batch_size"),
    a=move(),
    b=move(),
    g=move(),
    k_batch=amplitude("t", "num_tokens"),
    t=move(),
    c_batch=place("batch_size", "-d", "num_tokens"),
    d=move(),
)
def lr_batch_tilted(
    num_params, num_tokens, peak_lr, batch_size,
    *, E, A, alpha, B, beta, k_lr, s, c_lr, a, b, g, k_batch, t, c_batch, d,
):  # fmt: skip
    """L = E + A N^-α + B D^-β + k_η D^-s log²(η / (c_η N^-a D^b batch^g)) + k_B D^-t log²(batch / (c_B D^d))

    As ``lr_batch_valley``, with a best rate that moves with the batch and valleys that widen with data (Filatov et al.
    2025, arXiv 2410.05838, found the loss less sensitive to the rate the more tokens there are).
    """
    p = {"k_lr": k_lr, "s": s, "c_lr": c_lr, "a": a, "b": b, "g": g}
    p |= {"k_batch": k_batch, "t": t, "c_batch": c_batch, "d": d}
    off_lr, off_batch, wide_lr, wide_batch, _ = _valleys((num_params, num_tokens, peak_lr, batch_size), p)
    valleys = wide_lr * off_lr**2 + wide_batch * off_batch**2
    return E + A * num_params**-alpha + B * num_tokens**-beta + valleys


@law(
    "Lin et al. 2025 (arXiv 2507.21184), the additive law of the lr&bsz task",
    powers=PowerSum(
        "E",
        (
            ("A", {"num_params": "alpha"}),
            ("B", {"num_tokens": "beta"}),
            ("F", {"peak_lr": "f"}),
            ("G", {"peak_lr": "-g"}),
            ("H", {"batch_size": "h"}),
        ),
    ),
    E=offset(),
    A=amplitude("alpha", "num_params"),
    alpha=exponent(*SIZE_SLOPES),
    B=amplitude("beta", "num_tokens"),
    beta=exponent(*SLOPES),
    F=amplitude("f", "peak_lr"),
    f=exponent(0.4, 1.0),
    G=amplitude("-g", "peak_lr"),
    g=exponent(0.4, 1.0),
    H=amplitude("h", "batch_size"),
    h=real(-0.5, 0.5, lower=-3.0, upper=3.0),
)
def lr_batch_powers(num_params, num_tokens, peak_lr, batch_size, *, E, A, alpha, B, beta, F, f, G, g, H, h):
    """L = E + A N^-α + B D^-β + F η^-f + G η^g + H batch^-h"""
    size_and_data = A * num_params**-alpha + B * num_tokens**-beta
    return E + size_and_data + F * peak_lr**-f + G * peak_lr**g + H * batch_size**-h


@law(
    "Bu et al. 2026 (arXiv 2602.07145): the loss of convex training, bounded by what is left after η times the steps "
    "and by what the rate's noise adds; the powers are inferred",
    powers=PowerSum(
        "E",
        (
            ("A", {"num_params": "alpha"}),
            ("B", {"num_tokens": "beta"}),
            ("F", {"peak_lr": "f", "num_tokens": "f", "batch_size": "-f", "num_params": "p"}),
            ("G", {"peak_lr": "-g", "batch_size": "h", "num_params": "q"}),
        ),
    ),
    E=offset(),
    A=amplitude("alpha", "num_params"),
    alpha=exponent(*SIZE_SLOPES),
    B=amplitude("beta", "num_tokens"),
    beta=exponent(*SLOPES),
    F=amplitude("f", "peak_lr", "f", "num_tokens", "-f", "batch_size", "p", "num_params"),
    f=exponent(0.4, 1.0),
    p=move(),
    G=amplitude("-g", "peak_lr", "h", "batch_size", "q", "num_params"),
    g=exponent(0.4, 1.0),
    h=move(),
    q=move(),
)
def lr_batch_steps(num_params, num_tokens, peak_lr, batch_size, *, E, A, alpha, B, beta, F, f, p, G, g, h, q):
    """L = E + A N^-α + B D^-β + F (η D / batch)^-f N^-p + G η^g batch^-h N^-q

    η D / batch is the rate times the number of steps: too little of it leaves the start unforgotten. A high rate adds
    noise, less of it with a large batch. The minimum over η lies where the two balance.
    """
    unforgotten = F * (peak_lr * num_tokens / batch_size) ** -f * num_params**-p
    noise = G * peak_lr**g * batch_size**-h * num_params**-q
    return E + A * num_params**-alpha + B * num_tokens**-beta + unforgotten + noise


def _finite_batch_gradient(num_params, num_tokens, batch_tokens, *, E, A, alpha, B, beta, b, gamma):
    log_n, log_d = np.log(num_params), np.log(num_tokens)
    over = batch_tokens / (b * num_tokens**gamma)
    log_worth = log_d - np.log1p(over)
    size, data = np.exp(-alpha * log_n), np.exp(-beta * log_worth)
    by_crit = -beta * B * data * over / (1 + over)  # ∂ loss / ∂ log B_crit
    return {
        "E": np.ones_like(size * data), "A": size, "alpha": -A * size * log_n, "B": data,
        "beta": -B * data * log_worth, "b": by_crit / b, "gamma": by_crit * log_d,
    }  # fmt: skip


@law(
    "McCandlish et al. 2018 (arXiv 1812.06162), eq. 2.11, in the data term of Hoffmann et al. 2022; that B_crit moves "
    "with data and not with size: Zhang et al. 2024 (arXiv 2410.21676)",
    gradient=_finite_batch_gradient,
    E=offset(),
    A=amplitude("alpha", "num_params"),
    alpha=exponent(*SIZE_SLOPES),
    B=amplitude("beta", "num_tokens"),
    beta=exponent(*SLOPES),
    b=place("batch_tokens", "-gamma", "num_tokens"),
    gamma=real(0.0, 0.5, lower=-0.5, upper=1.5),
)
def finite_batch(num_params, num_tokens, batch_tokens, *, E, A, alpha, B, beta, b, gamma):
    """L = E + A N^-α + B (D / (1 + batch / B_crit))^-β, B_crit = b D^γ

    A run of S = S_min (1 + B_crit / batch) steps reads batch S = D_min (1 + batch / B_crit) tokens for what D_min are
    worth in small batches.
    """
    worth = num_tokens / (1 + batch_tokens / (b * num_tokens**gamma))
    return E + A * num_params**-alpha + B * worth**-beta


@law(
    "Tao et al. 2024 (arXiv 2407.13623), approach 3, in vocabulary size and characters",
    target="unigram_normalized_loss",
    signed=True,
    powers=PowerSum(
        "E",
        (
            ("A_1", {"non_vocab_parameters": "alpha_1"}),
            ("A_2", {"vocab_size": "alpha_2", "non_vocab_parameters": "w"}),
            ("B", {"num_characters": "beta", "vocab_size": "-phi"}),
        ),
    ),
    E=floor(),
    A_1=amplitude("alpha_1", "non_vocab_parameters"),
    alpha_1=exponent(*SIZE_SLOPES),
    A_2=amplitude("alpha_2", "vocab_size", "w", "non_vocab_parameters"),
    alpha_2=exponent(*SLOPES),
    w=move(),
    B=amplitude("beta", "num_characters", "-phi", "vocab_size"),
    beta=exponent(*SLOPES),
    phi=move(),
)
def vocabulary(non_vocab_parameters, vocab_size, num_characters, *, E, A_1, alpha_1, A_2, alpha_2, w, B, beta, phi):
    """L_u = E + A₁ N_nv^-α₁ + A₂ V^-α₂ N_nv^-w + B H^-β V^φ

    The paper writes L_u = -E + A₁ N_nv^-α₁ + A₂ (V d)^-α₂ + B D^-β of non-vocabulary parameters, vocabulary parameters
    V d and tokens D. Here the width d is a power of N_nv, and the characters in a token a power of V; E is its -E.
    """
    vocab = A_2 * vocab_size**-alpha_2 * non_vocab_parameters**-w
    return E + A_1 * non_vocab_parameters**-alpha_1 + vocab + B * num_characters**-beta * vocab_size**phi


@law(
    "Lin et al. 2025 (arXiv 2507.21184), the law of the vocabulary task with a joint term",
    target="unigram_normalized_loss",
    signed=True,
    powers=PowerSum(
        "E",
        (
            ("A", {"non_vocab_parameters": "a", "vocab_size": "v", "num_characters": "b"}),
            ("B", {"num_characters": "beta"}),
        ),
    ),
    E=floor(),
    A=amplitude("a", "non_vocab_parameters", "v", "vocab_size", "b", "num_characters"),
    a=move(),
    v=move(),
    b=move(),
    B=amplitude("beta", "num_characters"),
    beta=exponent(*SLOPES),
)
def vocabulary_joint(non_vocab_parameters, vocab_size, num_characters, *, E, A, a, v, b, B, beta):
    """L_u = E + A N_nv^-a V^-v H^-b + B H^-β"""
    joint = A * non_vocab_parameters**-a * vocab_size**-v * num_characters**-b
    return E + joint + B * num_characters**-beta


@law(
    "Li et al. 2026 (arXiv 2604.22753), law 6 of the vocab task",
    target="unigram_normalized_loss",
    signed=True,
    powers=PowerSum(
        "E",
        (
            ("A", {"non_vocab_parameters": "alpha", "vocab_size": "v"}),
            ("B", {"num_characters": "beta", "vocab_size": "w"}),
        ),
    ),
    E=floor(),
    A=amplitude("alpha", "non_vocab_parameters", "v", "vocab_size"),
    alpha=exponent(*SIZE_SLOPES),
    v=move(),
    B=amplitude("beta", "num_characters", "w", "vocab_size"),
    beta=exponent(*SLOPES),
    w=move(),
)
def vocabulary_effective(non_vocab_parameters, vocab_size, num_characters, *, E, A, alpha, v, B, beta, w):
    """L_u = E + A N_nv^-α V^-v + B H^-β V^-w"""
    size = A * non_vocab_parameters**-alpha * vocab_size**-v
    return E + size + B * num_characters**-beta * vocab_size**-w


@law(
    "Chen et al. 2025 (ParScale, arXiv 2505.10475), eq. 5",
    E=offset(),
    A=amplitude("alpha", "num_params"),
    alpha=exponent(*SIZE_SLOPES),
    k=positive(0.1, 0.4, 1.0, upper=1e3),
)
def parallel_streams(num_params, parallel_size, *, E, A, alpha, k):
    """L = E + A (N (k log P + 1))^-α

    P streams are worth k log P + 1 times the parameters. The paper's (A / N …)^α has its A to the power of α here.
    """
    return E + A * (num_params * (k * np.log(parallel_size) + 1)) ** -alpha


@law(
    "Chen et al. 2025 (ParScale, arXiv 2505.10475), eq. 4 with one ρ",
    E=offset(),
    A=amplitude("alpha", "num_params"),
    alpha=exponent(*SIZE_SLOPES),
    rho=real(0.5, 0.9, lower=0.0, upper=1.0),
)
def parallel_average(num_params, parallel_size, *, E, A, alpha, rho):
    """L = E + A N^-α ((P - 1) ρ + 1) / P

    The mean of P streams whose errors correlate by ρ.
    """
    return E + A * num_params**-alpha * ((parallel_size - 1) * rho + 1) / parallel_size


@law(
    "Li et al. 2026 (arXiv 2604.22753), law 10 of the parallel task",
    powers=PowerSum(None, (("A", {"num_params": "alpha", "parallel_size": "beta"}), ("E", {"parallel_size": "beta"}))),
    A=amplitude("alpha", "num_params", "beta", "parallel_size"),
    alpha=exponent(*SIZE_SLOPES),
    E=amplitude("beta", "parallel_size"),
    beta=exponent(0.02, 0.1),
)
def parallel_product(num_params, parallel_size, *, A, alpha, E, beta):
    """L = (A N^-α + E) P^-β"""
    return (A * num_params**-alpha + E) * parallel_size**-beta


@law(
    "Li et al. 2026 (arXiv 2604.22753), law 5 of the data_con task",
    powers=PowerSum("E", (("A", {"num_params": "alpha"}), ("B", {"unique_tokens": "u", "num_tokens": "d"}))),
    E=offset(),
    A=amplitude("alpha", "num_params"),
    alpha=exponent(*SIZE_SLOPES),
    B=amplitude("u", "unique_tokens", "d", "num_tokens"),
    u=exponent(*SLOPES),
    d=exponent(*SLOPES),
)
def repeated_product(num_params, num_tokens, unique_tokens, *, E, A, alpha, B, u, d):
    """L = E + A N^-α + B U^-u D^-d"""
    return E + A * num_params**-alpha + B * unique_tokens**-u * num_tokens**-d


@law(
    "arXiv 2605.09189 (Practical Scaling Laws, 2026)",
    E=offset(),
    L_0=positive(10.0, unit="nats/token", upper=1e3),
    a=amplitude("alpha", "num_params"),
    alpha=exponent(*SIZE_SLOPES),
    b=amplitude("beta", "num_tokens"),
    beta=exponent(*SLOPES),
    c=amplitude("-gamma", "num_params", "delta", "unique_tokens"),
    gamma=exponent(*SLOPES),
    delta=exponent(*SLOPES),
)
def repeated_overfit(num_params, num_tokens, unique_tokens, *, E, L_0, a, alpha, b, beta, c, gamma, delta):
    """L = E + (L₀ - E) h / (1 + h), h = (a N^-α + b D^-β + c N^γ U^-δ) / L₀

    c N^γ U^-δ is overfitting: large models on few unique tokens; L₀ is the loss of a model that knows nothing. The
    paper's a, b, c are these over L₀.
    """
    h = (a * num_params**-alpha + b * num_tokens**-beta + c * num_params**gamma * unique_tokens**-delta) / L_0
    return E + (L_0 - E) * h / (1 + h)


def any_columns(centre: Mapping[str, float], target: str = "loss", signed: bool = False) -> dict[str, Form]:
    """Laws of any columns, for a question that no paper has a law of; they are in no catalogue.

    - ``additive``: E + Σ A_j x_j^-α_j, Hoffmann et al. 2022's sum, of every column (an exponent may be negative)
    - ``joint``: E + A Π x_j^-α_j, columns that limit the loss together
    - ``surface``: E + A exp(Σ b_j u_j + Σ c_jk u_j u_k), u = log x - centre: the second-order response surface of Box
      and Wilson 1951 in logs, which may have an optimum in a column

    Args:
      centre: of each column the mean logarithm; all columns positive.
      signed: whether the target may be negative (``Form.signed``).
    """
    columns, size = tuple(centre), len(centre)
    bottom = floor() if signed else offset()
    either = real(-0.5, 0.2, 0.6, lower=-3.0, upper=3.0)
    pairs = [(j, k) for j in range(size) for k in range(j, size)]

    def additive(*x: Any, E: Any, **p: Any) -> Any:
        return E + sum(p[f"A{j}"] * x_j ** -p[f"a{j}"] for j, x_j in enumerate(x))

    def joint(*x: Any, E: Any, A: Any, **p: Any) -> Any:
        return E + A * np.exp(-sum(p[f"a{j}"] * np.log(x_j) for j, x_j in enumerate(x)))

    def surface(*x: Any, E: Any, A: Any, **p: Any) -> Any:
        u = [np.log(x_j) - centre[c] for c, x_j in zip(columns, x)]
        bent = sum(p[f"b{j}"] * u_j for j, u_j in enumerate(u))
        return E + A * np.exp(bent + sum(p[f"c{j}{k}"] * u[j] * u[k] for j, k in pairs))

    def surface_gradient(*x: Any, E: Any, A: Any, **p: Any) -> Any:
        u = [np.log(x_j) - centre[c] for c, x_j in zip(columns, x)]
        above = surface(*x, E=0.0, A=A, **p)
        slopes = {f"b{j}": above * u_j for j, u_j in enumerate(u)}
        return {
            "E": np.ones_like(above),
            "A": above / A,
            **slopes,
            **{f"c{j}{k}": above * u[j] * u[k] for j, k in pairs},
        }

    own = {f"{name}{j}": p for j, c in enumerate(columns) for name, p in (("A", amplitude(f"a{j}", c)), ("a", either))}
    together = amplitude(*(part for j, c in enumerate(columns) for part in (f"a{j}", c)))
    slopes = {f"b{j}": real(-0.3, 0.1, lower=-3.0, upper=3.0) for j in range(size)}
    bends = {f"c{j}{k}": real(0.0, lower=-3.0, upper=3.0) for j, k in pairs}
    options: dict[str, Any] = {
        "columns": columns,
        "source": "no paper: of any columns",
        "target": target,
        "signed": signed,
    }
    sums = PowerSum("E", tuple((f"A{j}", {c: f"a{j}"}) for j, c in enumerate(columns)))
    product = PowerSum("E", (("A", {c: f"a{j}" for j, c in enumerate(columns)}),))
    exponents = {f"a{j}": either for j in range(size)}
    found = [
        Form("additive", additive, {"E": bottom, **own}, equation="L = E + Σ A_j x_j^-α_j", powers=sums, **options),
        Form(
            "joint", joint, {"E": bottom, "A": together, **exponents},
            equation="L = E + A Π x_j^-α_j", powers=product, **options,
        ),
        Form(
            "surface", surface, {"E": bottom, "A": amplitude(), **slopes, **bends},
            equation="L = E + A e^(Σ b_j u_j + Σ c_jk u_j u_k)", gradient=surface_gradient, **options,
        ),
    ]  # fmt: skip
    return {form.name: form for form in found}
