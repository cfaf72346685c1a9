"""The catalogue of laws. Each is the equation as its paper writes it; see ``law`` for how to add one.

Those of learning rate and batch, vocabulary, parallel streams and repetition are in ``settings``.
"""

import numpy as np

from scaling.laws.forms import settings  # noqa: F401  # its laws are registered with those below
from scaling.laws.forms.law import (
    FORMS,
    Form,
    Parameter,
    PowerSum,
    amplitude,
    critical,
    exponent,
    get,
    law,
    offset,
    positive,
    real,
)

__all__ = [
    "FORMS", "Form", "Parameter", "PowerSum", "amplitude", "broken_power_law", "critical", "exponent", "get", "law",
    "offset", "positive", "real",
]  # fmt: skip

# Where a multi-start looks for the exponents of terms beside an offset. From .06 the offset first falls to nothing, and
# coming back takes most of a fit's time; flatter laws than .1 are still found from .12.
ADDITIVE = (0.12, 0.25, 0.4, 0.7, 1.1)


@law(
    "Kaplan et al. 2020, eq. 1.1",
    powers=PowerSum(None, (("N_c", {"num_params": "alpha"}),)),
    N_c=critical("alpha", "num_params", "parameters"),
    alpha=exponent(),
)
def kaplan_n(num_params, *, N_c, alpha):
    """L(N) = (N_c / N)^α"""
    return (N_c / num_params) ** alpha


@law(
    "Kaplan et al. 2020, eq. 1.2",
    powers=PowerSum(None, (("D_c", {"num_tokens": "alpha"}),)),
    D_c=critical("alpha", "num_tokens", "tokens"),
    alpha=exponent(),
)
def kaplan_d(num_tokens, *, D_c, alpha):
    """L(D) = (D_c / D)^α"""
    return (D_c / num_tokens) ** alpha


@law(
    "Kaplan et al. 2020, eq. 1.3",
    powers=PowerSum(None, (("C_c", {"flops": "alpha"}),)),
    C_c=critical("alpha", "flops", "FLOPs"),
    alpha=exponent(),
)
def kaplan_c(flops, *, C_c, alpha):
    """L(C) = (C_c / C)^α"""
    return (C_c / flops) ** alpha


@law(
    "Henighan et al. 2020, eq. 1.1",
    powers=PowerSum("E", (("N_c", {"num_params": "alpha"}),)),
    E=offset(),
    N_c=critical("alpha", "num_params", "parameters"),
    alpha=exponent(),
)
def kaplan_n_offset(num_params, *, E, N_c, alpha):
    """L(N) = E + (N_c / N)^α"""
    return E + (N_c / num_params) ** alpha


@law(
    "Henighan et al. 2020, eq. 1.1",
    powers=PowerSum("E", (("D_c", {"num_tokens": "alpha"}),)),
    E=offset(),
    D_c=critical("alpha", "num_tokens", "tokens"),
    alpha=exponent(),
)
def kaplan_d_offset(num_tokens, *, E, D_c, alpha):
    """L(D) = E + (D_c / D)^α"""
    return E + (D_c / num_tokens) ** alpha


@law(
    "Henighan et al. 2020, eq. 1.1",
    powers=PowerSum("E", (("C_c", {"flops": "alpha"}),)),
    E=offset(),
    C_c=critical("alpha", "flops", "FLOPs"),
    alpha=exponent(),
)
def kaplan_c_offset(flops, *, E, C_c, alpha):
    """L(C) = E + (C_c / C)^α"""
    return E + (C_c / flops) ** alpha


@law(
    "Hoffmann et al. 2022, eq. 2 (approach 3)",
    powers=PowerSum("E", (("A", {"num_params": "alpha"}), ("B", {"num_tokens": "beta"}))),
    E=offset(),
    A=amplitude("alpha", "num_params"),
    alpha=exponent(*ADDITIVE),
    B=amplitude("beta", "num_tokens"),
    beta=exponent(*ADDITIVE),
)
def chinchilla(num_params, num_tokens, *, E, A, alpha, B, beta):
    """L(N, D) = E + A N^-α + B D^-β"""
    return E + A * num_params**-alpha + B * num_tokens**-beta


@law(
    "Hoffmann et al. 2022 with one exponent, as Muennighoff et al. 2023 fit it",
    powers=PowerSum("E", (("A", {"num_params": "alpha"}), ("B", {"num_tokens": "alpha"}))),
    E=offset(),
    A=amplitude("alpha", "num_params"),
    B=amplitude("alpha", "num_tokens"),
    alpha=exponent(*ADDITIVE),
)
def chinchilla_tied(num_params, num_tokens, *, E, A, B, alpha):
    """L(N, D) = E + A N^-α + B D^-α"""
    return E + A * num_params**-alpha + B * num_tokens**-alpha


@law(
    "Busbridge et al. 2025 (Distillation Scaling Laws, arXiv 2502.08606), the supervised law; Kaplan et al. 2020, eq. "
    "1.5, with a floor",
    powers=PowerSum("E", (("A", {"num_params": "alpha"}), ("B", {"num_tokens": "beta"})), join="gamma"),
    E=offset(),
    A=amplitude("alpha", "num_params"),
    alpha=exponent(*ADDITIVE),
    B=amplitude("beta", "num_tokens"),
    beta=exponent(*ADDITIVE),
    gamma=positive(0.5, 1.0, lower=0.02, upper=10.0),
)
def joined(num_params, num_tokens, *, E, A, alpha, B, beta, gamma):
    """L(N, D) = E + ((A N^-α)^(1/γ) + (B D^-β)^(1/γ))^γ

    Hoffmann's law at γ = 1, Kaplan's joint one at E = 0 and γ = α_D: size alone, or data alone, leaves A N^-α or
    B D^-β, and γ says how much worse the two together are than the worse of them, so that the bend of a budget's
    profile and the fall of its minimum with compute need not be one number. In the paper's letters, E + (A'/N^α' +
    B'/D^β')^γ, A = A'^γ and α = γ α'.
    """
    size, data = A * num_params**-alpha, B * num_tokens**-beta
    size, data = np.broadcast_arrays(size, data)
    larger, smaller = (np.where((np.real(size) >= np.real(data)) == first, size, data) for first in (True, False))
    # Over the larger of the two, so that neither is lost, nor the power 1/γ too large.
    ratio = smaller / np.where(larger == 0, 1.0, larger)
    return E + larger * (1 + ratio ** (1 / gamma)) ** gamma


@law(
    "arXiv 2605.09189 (Practical Scaling Laws, 2026) where no token repeats; of one column Alabdulmohsin et al. 2022 "
    "(Revisiting Neural Scaling Laws), M4 at α = 1",
    powers=PowerSum("E", (("A", {"num_params": "alpha"}), ("B", {"num_tokens": "beta"})), ceiling="L_0"),
    E=offset(),
    L_0=positive(4.0, 12.0, 40.0, unit="nats/token", upper=1e3),
    A=amplitude("alpha", "num_params"),
    alpha=exponent(*ADDITIVE),
    B=amplitude("beta", "num_tokens"),
    beta=exponent(*ADDITIVE),
)
def saturating(num_params, num_tokens, *, E, L_0, A, alpha, B, beta):
    """L(N, D) = E + r / (1 + r / (L₀ - E)), r = A N^-α + B D^-β

    Hoffmann's law, E + r, where r is small, and never above L₀ however small the model and its data: for laws over so
    many decades that the least runs have learnt little more than how often each token comes, whose entropy is near L₀
    then. (The first paper's a, b are A, B over L₀ - E; the second's (ε - ε_∞) / (ε_0 - ε)^α is r / (L₀ - E).)
    """
    r = A * num_params**-alpha + B * num_tokens**-beta
    return E + r / (1 + r / (L_0 - E))


def _kaplan_joint_gradient(num_params, num_tokens, *, N_c, alpha_N, D_c, alpha_D):
    ratio = alpha_N / alpha_D
    distance = np.log(N_c / num_params)
    size = np.exp(ratio * distance)
    total = size + D_c / num_tokens
    level = np.exp(alpha_D * np.log(total))
    outer = level / total
    return {
        "N_c": outer * alpha_N * size / N_c,
        "alpha_N": outer * size * distance,
        "D_c": outer * alpha_D / num_tokens,
        "alpha_D": level * np.log(total) - outer * size * distance * ratio,
    }


@law(
    "Kaplan et al. 2020, eq. 1.5",
    gradient=_kaplan_joint_gradient,
    N_c=positive(1e9, 1e12, 1e15, unit="parameters"),
    alpha_N=exponent(0.05, 0.1, 0.3),
    D_c=positive(1e9, 1e12, 1e15, unit="tokens"),
    alpha_D=exponent(0.05, 0.1, 0.3),
)
def kaplan_joint(num_params, num_tokens, *, N_c, alpha_N, D_c, alpha_D):
    """L(N, D) = [(N_c / N)^(α_N/α_D) + D_c / D]^α_D"""
    return ((N_c / num_params) ** (alpha_N / alpha_D) + D_c / num_tokens) ** alpha_D


@law(
    "Kaplan et al. 2020, eq. 1.6",
    powers=PowerSum(None, (("N_c", {"num_params": "alpha_N"}), ("S_c", {"num_steps": "alpha_S"}))),
    N_c=critical("alpha_N", "num_params", "parameters"),
    alpha_N=exponent(),
    S_c=critical("alpha_S", "num_steps", "steps"),
    alpha_S=exponent(),
)
def kaplan_steps(num_params, num_steps, *, N_c, alpha_N, S_c, alpha_S):
    """L(N, S) = (N_c / N)^α_N + (S_c / S)^α_S"""
    return (N_c / num_params) ** alpha_N + (S_c / num_steps) ** alpha_S


@law(
    "Muennighoff et al. 2023, eq. 5-7 and appendix A",
    E=offset(),
    A=amplitude("alpha", "num_params"),
    alpha=exponent(0.1, 0.3, 0.6),
    B=amplitude("beta", "num_tokens"),
    beta=exponent(0.1, 0.3, 0.6),
    R_D=positive(1.0, 10.0, 100.0, unit="repetitions", upper=1e6),
    R_N=positive(1.0, 10.0, 100.0, unit="excess sizes", upper=1e6),
)
def data_constrained(num_params, num_tokens, unique_tokens, *, E, A, alpha, B, beta, R_D, R_N):
    """L = E + A N'^-α + B D'^-β, D' = U (1 + R_D* (1 - e^(-(D/U-1)/R_D*))), N' likewise of N / N_opt(U)

    N_opt(U) is the size that U tokens are compute-optimal for; repetition and excess size are worth less and less.
    Of ``unique_tokens`` a run shorter than an epoch sees U = D.
    """
    unique_tokens = np.minimum(unique_tokens, num_tokens)
    G = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
    base = np.minimum((unique_tokens * G) ** (beta / alpha) * G, num_params)
    repeats = np.maximum(num_tokens / unique_tokens - 1, 0)
    excess = np.maximum(num_params / base - 1, 0)
    effective_params = base * (1 - R_N * np.expm1(-excess / R_N))
    effective_tokens = unique_tokens * (1 - R_D * np.expm1(-repeats / R_D))
    return E + A * effective_params**-alpha + B * effective_tokens**-beta


@law(
    "Gadre et al. 2024, eq. 4",
    powers=PowerSum(
        "E",
        (("a", {"tokens_per_param": "-eta", "flops": "eta"}), ("b", {"tokens_per_param": "eta", "flops": "eta"})),
    ),
    E=offset(),
    a=amplitude("-eta", "tokens_per_param", "eta", "flops"),
    b=amplitude("eta", "tokens_per_param", "eta", "flops"),
    eta=exponent(),
)
def overtraining(flops, tokens_per_param, *, E, a, b, eta):
    """L(C, M) = E + (a M^η + b M^-η) C^-η, M = D / N"""
    return E + (a * tokens_per_param**eta + b * tokens_per_param**-eta) * flops**-eta


@law(
    "Gadre et al. 2024, eq. 5",
    target="error",
    epsilon=real(0.7, 0.9, 1.0, lower=0.0, upper=2.0),
    k=positive(0.5, 2.0, 10.0),
    gamma=positive(0.2, 0.7, 2.0, unit="1/nat"),
)
def downstream_error(loss, *, epsilon, k, gamma):
    """Err(L) = ε - k e^(-γ L)"""
    return epsilon - k * np.exp(-gamma * loss)


def broken_power_law(column: str, breaks: int = 1, name: str | None = None) -> Form:
    """Caballero et al. 2023, eq. 1, with ``breaks`` breaks in ``column``.

    y = a + b x^-c0 Π_i (1 + (x/d_i)^(1/f_i))^(-c_i f_i): slopes change by c_i at d_i, over a width f_i in log x.
    """
    several = [(f"c{i}", f"d{i}", f"f{i}") for i in range(1, breaks + 1)]

    def parts(x, p):
        """The part above a, and each break's log(x/d)/f and log(1 + (x/d)^(1/f)), which never overflow."""
        u = np.log(x)
        exponent, bends = -p["c0"] * u, []
        for c, d, f in several:
            z = (u - np.log(p[d])) / p[f]
            above = np.where(z.real > 0, z, 0)
            bend = above + np.log(np.exp(-above) + np.exp(z - above))
            exponent = exponent - p[c] * p[f] * bend
            bends.append((z, bend))
        return p["b"] * np.exp(exponent), bends

    def function(x, **p):
        return p["a"] + parts(x, p)[0]

    def gradient(x, **p):
        y, bends = parts(x, p)
        out = {"a": np.ones_like(y), "b": y / p["b"], "c0": -y * np.log(x)}
        for (c, d, f), (z, bend) in zip(several, bends):
            turned = np.exp(z - bend)
            out |= {c: -y * p[f] * bend, d: y * p[c] * turned / p[d], f: y * p[c] * (turned * z - bend)}
        return out

    parameters = {"a": offset(), "b": amplitude("c0", column), "c0": real(0.05, 0.2, 0.5, lower=-3.0, upper=3.0)}
    for c, d, f in several:
        parameters[c] = real(-0.15, 0.15, 0.5, lower=-3.0, upper=3.0)
        parameters[d] = Parameter("location", unit=column, of=((1.0, column),), starts=(0.2, 0.5, 0.8))
        parameters[f] = positive(0.1, 0.5, lower=1e-2, upper=10.0)
    return Form(
        name=name or f"broken_{column}_{breaks}",
        function=function,
        parameters=parameters,
        columns=(column,),
        gradient=gradient,
        equation="y = a + b x^-c0 Π_i (1 + (x/d_i)^(1/f_i))^(-c_i f_i)",
        source="Caballero et al. 2023, eq. 1",
    )


for _name, _column in (("broken_n", "num_params"), ("broken_d", "num_tokens"), ("broken_c", "flops")):
    FORMS[_name] = broken_power_law(_column, name=_name)


def _farseer_gradient(num_params, num_tokens, *, a1, b1, alpha, a2, b2, beta, a3, b3, gamma):
    u, v = np.log(num_params), np.log(num_tokens)
    first, second, third = (np.exp(e * u) for e in (alpha, beta, gamma))
    power = np.exp(a1 * first + b1)
    floor = np.exp(a3 * third + b3)
    data = np.exp(a2 * second + b2 - power * v)
    slope = -data * v * power
    return {
        "a1": slope * first, "b1": slope, "alpha": slope * (a1 * u) * first,
        "a2": data * second, "b2": data, "beta": data * (a2 * u) * second,
        "a3": floor * third, "b3": floor, "gamma": floor * (a3 * u) * third,
    }  # fmt: skip


@law(
    "Li et al. 2025 (Farseer), eq. 6",
    gradient=_farseer_gradient,
    a1=Parameter("slope", -5.0, 5.0, starts=(-0.2, -0.05), of=(("alpha", "num_params"),)),
    b1=Parameter("level", -5.0, 2.0, starts=(-1.3, -0.7), of=(("alpha", "a1"),)),
    alpha=real(0.1, 0.2, lower=-1.0, upper=1.0),
    a2=Parameter("slope", -10.0, 10.0, starts=(-1.0, -0.3), of=(("beta", "num_params"),)),
    b2=Parameter("level", -20.0, 50.0, starts=(6.0, 9.0), of=(("beta", "a2"),)),
    beta=real(-0.1, lower=-1.0, upper=1.0),
    a3=Parameter("slope", -5.0, 5.0, starts=(-0.1, -0.02), of=(("gamma", "num_params"),)),
    b3=Parameter("level", -5.0, 3.0, starts=(-0.5, 0.2), of=(("gamma", "a3"),)),
    gamma=real(0.1, 0.2, lower=-1.0, upper=1.0),
)
def farseer(num_params, num_tokens, *, a1, b1, alpha, a2, b2, beta, a3, b3, gamma):
    """L(N, D) = e^(a3 N^γ + b3) + e^(a2 N^β + b2) D^(-e^(a1 N^α + b1))"""
    u, v = np.log(num_params), np.log(num_tokens)
    power = np.exp(a1 * np.exp(alpha * u) + b1)
    return np.exp(a3 * np.exp(gamma * u) + b3) + np.exp(a2 * np.exp(beta * u) + b2 - power * v)


@law(
    "two quantities that limit the loss multiplicatively, without a floor",
    powers=PowerSum(None, (("K", {"num_params": "a", "num_tokens": "b"}),)),
    K=amplitude("a", "num_params", "b", "num_tokens"),
    a=exponent(lower=-3.0),
    b=exponent(lower=-3.0),
)
def product(num_params, num_tokens, *, K, a, b):
    """L(N, D) = K N^-a D^-b"""
    return K * num_params**-a * num_tokens**-b


@law(
    "performance as the geometric mean of size and data",
    target="performance",
    powers=PowerSum(None, (("k", {"num_params": -0.5, "num_tokens": -0.5}),)),
    k=amplitude(-0.5, "num_params", -0.5, "num_tokens", unit="performance"),
)
def square_root(num_params, num_tokens, *, k):
    """Performance = k √N √D"""
    return k * np.sqrt(num_params) * np.sqrt(num_tokens)


@law(
    "Kaplan et al. 2020, eq. 1.4",
    target="critical_batch_tokens",
    B_star=positive(1e4, 1e6, 1e8, unit="tokens"),
    alpha_B=exponent(0.1, 0.2, 0.5, upper=10.0),
)
def critical_batch(loss, *, B_star, alpha_B):
    """B*(L) = B_* L^(-1/α_B)"""
    return B_star * loss ** (-1 / alpha_B)


@law(
    "Li et al. 2025 (Step Law), eq. 1",
    target="peak_lr",
    powers=PowerSum(None, (("c", {"num_params": "a", "num_tokens": "-b"}),)),
    c=amplitude("a", "num_params", "-b", "num_tokens", unit="learning rate"),
    a=exponent(0.3, 0.7, lower=-3.0),
    b=exponent(-0.2, 0.3, lower=-3.0),
)
def peak_lr(num_params, num_tokens, *, c, a, b):
    """peak_lr(N, D) = c N^-a D^b"""
    return c * num_params**-a * num_tokens**b


@law(
    "Li et al. 2025 (Step Law), eq. 1; DeepSeek-AI 2024",
    target="batch_tokens",
    powers=PowerSum(None, (("c", {"num_params": "-a", "num_tokens": "-b"}),)),
    c=amplitude("-a", "num_params", "-b", "num_tokens", unit="tokens"),
    a=exponent(0.0, 0.3, lower=-3.0),
    b=exponent(0.3, 0.6, lower=-3.0),
)
def batch(num_params, num_tokens, *, c, a, b):
    """batch_tokens(N, D) = c N^a D^b"""
    return c * num_params**a * num_tokens**b
