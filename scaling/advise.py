"""The command that advises: a fitted law and a question → what to do, with intervals.

    python -m scaling.advise SOURCE --flops 1e15 | --dollars 500 --hardware h100 | --loss 1.1 | --tokens 1e9 | …

SOURCE is what ``python -m scaling.fit`` reads, or the fit.json that it wrote beside its runs. From Python the same is
``advise(fit, flops=1e15)`` of the package: the module itself can be called, as otherwise it would hide the function of
its name.
"""

import argparse
import dataclasses
import math
import numbers
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypedDict, Unpack

import numpy as np

from scaling import fit as fitting
from scaling import records, storage, terminal
from scaling.devices import DEVICE_BATCH, DTYPE, PROFILES, Profile
from scaling.laws.analysis import DEFAULT_LAWS, Analysis, analyse
from scaling.laws.answers.advice import batches, downstream, groups, machines, questions
from scaling.laws.answers.advice.basis import Answer
from scaling.laws.answers.advice.budget import Budget
from scaling.laws.answers.multiplier import compare as compare_groups
from scaling.laws.payload import finite
from scaling.laws.tables.reading import parse
from scaling.report import printed

UNITS = ("nats", "bits", "bits_per_byte")
WORDS = ("critical_batch", "downstream", "hardware")  # beside numbers
SHARES = ("mfu", "share_read", "prefill_mfu", "decoding_mfu")  # of one
# What questions of serving, of a deadline and of worth take beside what all may (``advise``).
SERVING = {
    "inference_tokens": (
        "share_read", "prefill_mfu", "decoding_mfu", "decode_batch", "bytes_per_weight", "serving_price",
    ),
    "deadline": ("device_batch", "critical_batch"),
    "value": ("downstream",),
}  # fmt: skip
BUDGETS = ("flops", "dollars", "hours")
PLAIN = (*BUDGETS, "loss", "tokens", "num_params")  # questions of training alone
WAYS = {"deadline": (), "inference_tokens": (*BUDGETS, "loss", "num_params"), "value": BUDGETS}  # and what they take
_COUNTS = {2: "two", 3: "three"}
FIT = "fit.json"
FITTED = "runs"  # of ``critical_batch``: what these runs' own batches say
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


class Asked(TypedDict, total=False):
    """A question of ``advise``, by name; None is as good as not written."""

    flops: float | None
    dollars: float | None
    hours: float | None
    loss: float | None
    num_tokens: float | None
    unique_tokens: float | None
    num_params: float | None
    inference_tokens: float | None
    deadline: float | None
    value: bool
    unit: str
    hardware: str | None
    devices: float | None
    price: float | None
    mfu: float | None
    share_read: float | None
    prefill_mfu: float | None
    decoding_mfu: float | None
    decode_batch: float | None
    bytes_per_weight: float | None
    serving_price: float | None
    device_batch: float | None
    critical_batch: float | str | None
    downstream: str | None


def advise(fit: Any, **asked: Unpack[Asked]) -> Answer:
    """Answers one question by a fitted law, with intervals from the fit's own draws.

    Args:
      fit: of a study (``study.Study.fit``), or an ``analysis.Analysis``.
      flops, dollars, hours: a training budget; the last two on ``devices`` of ``hardware`` (``scaling.devices``).
      loss: to be reached, in ``unit``.
      num_tokens, unique_tokens: the data there are.
      num_params: a size.
      inference_tokens: to be served over the model's life, at the quality that flops, loss or num_params says. With
        ``hardware`` in dollars, and then of these: share_read (of the tokens, that are a prompt), prefill_mfu,
        decoding_mfu, serving_price, or decode_batch and bytes_per_weight, which bound decoding by reading the weights.
      deadline: seconds, on ``devices`` of ``hardware``; then also device_batch and critical_batch, tokens;
        critical_batch "runs" is fitted to the runs, whose batches must differ (``batches.fitted``).
      value: what a doubling of N, D and C takes off the loss, and with downstream, a column of the table, off that
        error, by its law of the loss (``downstream_error``).
      devices: how many (1); price, mfu: the hardware's, dollars per device-hour and share of the peak, instead of its
        profile's.
      unit: of losses: nats, bits (both per what the loss is per), or bits_per_byte, where the runs say it.

    Raises:
      TypeError: an argument that is none of these.
      ValueError: no question, one that lacks a part, or a law that cannot answer it; says what to write.
    """
    return Question(asked).answer(getattr(fit, "analysis", fit), getattr(fit, "table", None))


class Question:
    """A question that can be asked of a law, whichever it is: all that needs no fit is checked here.

    Raises TypeError and ValueError as ``advise`` does.
    """

    def __init__(self, asked: Mapping[str, Any]) -> None:
        if unknown := [name for name in asked if name not in Asked.__annotations__]:
            raise TypeError(f"advise() has no argument {unknown[0]!r}: write one of {', '.join(Asked.__annotations__)}")
        written = {name: v for name, v in asked.items() if v is not None and (name != "value" or v)}
        self.unit = written.pop("unit", "nats")
        if self.unit not in UNITS:
            raise ValueError(f"--unit is {self.unit}: write one of {', '.join(UNITS)}")
        hardware = written.pop("hardware", None)
        given = {"tokens" if name == "num_tokens" else name: v for name, v in written.items()}  # as the command has it
        self.given: dict[str, Any] = {"devices": 1, **given}
        _check(self.given)
        self.way = _way(self.given)
        self.machine = None if hardware is None else Machine(hardware, given.get("price"), given.get("mfu"))
        if "flops" in given:
            self.given["budget"] = Budget.of_flops(given["flops"])
        elif "dollars" in given or "hours" in given:
            on = _needed(self.machine, "--dollars and --hours")
            self.given["budget"] = on.budget(given.get("dollars"), given.get("hours"), self.given["devices"])
        if self.way == "deadline":
            _needed(self.machine, "--deadline")
        self.prices = None
        if self.way == "inference_tokens" and self.machine is not None:
            self.prices = self.machine.prices(given)

    def answer(self, found: Analysis, table: Any = None) -> Answer:
        """Answers it by fitted laws; ``table``: of the runs, where they are at hand. Raises ValueError."""
        given, way, factor = self.given, self.way, _factor(self.unit, table, found)
        if "loss" in given:
            loss, unit = given["loss"], "" if self.unit == "nats" else f" {self._unit}"
            given = {**given, "loss": loss / factor, "asked": f"{loss:g}{unit}"}

        def told(nats: float) -> str:
            return f"{nats * factor:.4g} {self._unit}"

        quality = {name: given.get(name) for name in ("budget", "loss", "num_params")}
        share = given.get("share_read", 0.0)
        answers: dict[str, Callable[[], Answer]] = {
            "deadline": lambda: _by_deadline(found, given, self.machine, table),  # type: ignore[arg-type]  # it is there
            "inference_tokens": lambda: machines.of_inference(
                found, given["inference_tokens"], **quality, share_read=share, prices=self.prices, told=told
            ),
            "value": lambda: _valued(found, given, table),
            **dict.fromkeys(BUDGETS, lambda: questions.of_budget(found, given["budget"])),
            "loss": lambda: questions.of_loss(found, given["loss"], given["asked"], told),
            "tokens": lambda: questions.of_data(found, given["tokens"], given.get("unique_tokens")),
            "num_params": lambda: questions.of_num_params(found, given["num_params"]),
        }
        answer = answers[way]()
        return answer if self.unit == "nats" else answer.in_unit(factor, self._unit)

    @property
    def _unit(self) -> str:
        return self.unit.replace("_", " ")


def check_numbers(given: Mapping[str, Any]) -> None:
    """Raises ValueError on a number, by option, that is not positive, or is no share where it is to be one."""
    for name, v in given.items():
        option = _option(name)
        if name == "critical_batch" and isinstance(v, str) and v != FITTED:
            raise ValueError(f"{option} is {v}: write a number of tokens, or {FITTED}")
        if isinstance(v, str) and name not in WORDS:
            raise ValueError(f"{option} is {v!r}: write a number")
        if not isinstance(v, numbers.Real):  # a column's name, a law of the critical batch
            continue
        number = float(v)
        if name in SHARES and not (0 < number <= 1 or (name == "share_read" and number == 0)):
            raise ValueError(f"{option} is {v}: write a share, above 0 and at most 1")
        if name not in SHARES and not (math.isfinite(number) and number > 0):
            raise ValueError(f"{option} is {v}: write a positive number")


def _check(given: Mapping[str, Any]) -> None:
    """Raises ValueError on a number out of its range, or an option that the question does not take."""
    check_numbers(given)
    for question, names in SERVING.items():
        unused = [_option(name) for name in names if name in given and question not in given]
        if unused:
            raise ValueError(f"{', '.join(unused)}: only {_option(question)} takes it: write that too")
    if "unique_tokens" in given and "tokens" not in given and not any(name in given for name in WAYS):
        raise ValueError("--unique-tokens is a part of the tokens there are: write --tokens with it")
    if len([name for name in BUDGETS if name in given]) > 1:
        raise ValueError("--flops, --dollars and --hours are one budget: write one of them")


def _way(given: Mapping[str, Any]) -> str:
    """The one question that ``given`` asks, by option. Raises ValueError where there is none, or another beside it."""
    ways = [name for name in WAYS if name in given]
    if len(ways) > 1:
        raise ValueError(f"{' and '.join(map(_option, ways))} are {_COUNTS[len(ways)]} questions: write one")
    for question in ways:
        if other := [name for name in (*PLAIN, "unique_tokens") if name in given and name not in WAYS[question]]:
            said = ", ".join(_option(name) for name in other)
            raise ValueError(f"{said}: {_option(question)} does not take it: ask one of them")
        return question
    written = [name for name in PLAIN if name in given]
    if len(written) == 1:
        return written[0]
    said = f"{' and '.join(map(_option, written))} are {len(written)} questions" if written else "no question"
    known = ", ".join(map(_option, PLAIN))
    raise ValueError(f"{said}: write one of {known}, --inference-tokens, --deadline, --value, --compare")


def _flops(found: Analysis, given: Mapping[str, Any]) -> float | None:
    """The FLOPs of the budget, at the size that is best for it; None where none is given."""
    return given["budget"].flops_at_best(found) if "budget" in given else None


def _valued(found: Analysis, given: Mapping[str, Any], table: Any) -> Answer:
    if (column := given.get("downstream")) is None:
        return questions.value(found, _flops(found, given))
    if table is None:
        raise ValueError("--downstream is of a table: advise a fit of runs (scaling.open)")
    drawn = len(next(iter(found.draws.values()), ()))
    error, notes = downstream.fitted(table, column, found.observations, drawn)
    answer = questions.value(found, _flops(found, given), error)
    return dataclasses.replace(answer, notes=(*answer.notes, *notes))


def _by_deadline(found: Analysis, given: Mapping[str, Any], machine: "Machine", table: Any) -> Answer:
    batch = given.get("device_batch", DEVICE_BATCH)
    cluster = machines.Cluster(given["devices"], machine.rate, batch, machine.dollars_per_second)
    if given.get("critical_batch") != FITTED:
        return machines.of_deadline(found, given["deadline"], cluster, given.get("critical_batch"))
    if table is None:
        raise ValueError(f"--critical-batch is {FITTED}: advise a fit of runs (scaling.open), or write a number")
    law, doubts = batches.fitted(table, found.observations)
    answer = machines.of_deadline(found, given["deadline"], cluster, law)
    return dataclasses.replace(answer, notes=(*answer.notes, *doubts))


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


class Machine:
    """A device of ``scaling.devices`` as answers take it: what it reaches on a size, what a FLOP costs on it.

    Utilisations were published by total parameters; a law's N may leave the embedding out.
    """

    def __init__(self, name: str, price: float | None = None, mfu: float | None = None) -> None:
        if name not in PROFILES:
            raise ValueError(f"--hardware is {name}: write one of {', '.join(PROFILES)}")
        self.profile: Profile = PROFILES[name]
        if self.profile.flops_per_second(DTYPE, 1e9, mfu) is None:
            missing = "no published peak: name other hardware" if not self.profile.peak_flops else (
                "no published utilisation: add --mfu")  # fmt: skip
            raise ValueError(f"--hardware {name} has {missing}")
        self.mfu = mfu
        self.price = self.profile.price_per_device_hour if price is None else price

    @property
    def dollars_per_second(self) -> float | None:
        return None if self.price is None else self.price / 3600

    def rate(self, num_params: np.ndarray) -> np.ndarray:
        """FLOP/s of one device in training a model of N parameters, shaped like it."""
        reached = self.profile.flops_per_second(DTYPE, num_params, self.mfu)
        return np.broadcast_to(reached, np.shape(num_params))

    def paid(self) -> float:
        """Dollars a second. Raises ValueError where no price is known."""
        if self.dollars_per_second is None:
            raise ValueError(f"--hardware {self.profile.name} has no known price: add --price, dollars per device-hour")
        return self.dollars_per_second

    def budget(self, dollars: float | None, hours: float | None, devices: float) -> Budget:
        """Money, or hours of so many devices, as time of one of them. Raises ValueError where no price is known."""
        seconds = 3600 * hours * devices if hours is not None else dollars / self.paid()  # type: ignore[operator]  # one of two
        name = self.profile.name
        said = f"{hours:g} hours of {devices:g} {name}" if hours is not None else f"{dollars:g} dollars of {name}"
        return Budget.of_time(seconds, self.rate, said)

    def prices(self, serving: Mapping[str, Any]) -> machines.Prices:
        """Dollars a FLOP in training, prefill and decoding.

        Decoding at batch b reads N w bytes for 2 N b FLOPs: it reaches no more than 2 b bandwidth / w FLOP/s (the
        roofline), or what is given.
        """
        peak, a_second = self.profile.peak_flops[DTYPE], self.paid()
        served = a_second if serving.get("serving_price") is None else serving["serving_price"] / 3600

        def training(n: np.ndarray) -> np.ndarray:
            return a_second / self.rate(n)

        def prefill(n: np.ndarray) -> np.ndarray:
            share = serving.get("prefill_mfu")
            return served / (self.rate(n) if share is None else peak * share * np.ones_like(n))

        def decoding(n: np.ndarray) -> np.ndarray:
            if (share := serving.get("decoding_mfu")) is None:
                read = 2 * serving["decode_batch"] * self.profile.memory_bandwidth / serving["bytes_per_weight"]
                return served / np.minimum(served / prefill(n), read)
            return served / (peak * share * np.ones_like(n))

        if serving.get("decoding_mfu") is None and not (
            serving.get("decode_batch") and serving.get("bytes_per_weight")
        ):
            raise ValueError(
                "money for inference needs what decoding reaches: write --decoding-mfu, or --decode-batch and "
                "--bytes-per-weight"
            )
        return machines.Prices(training, prefill, decoding, "dollars")


def _needed(machine: Machine | None, what: str) -> Machine:
    if machine is None:
        raise ValueError(f"{what} are counted on hardware: add --hardware, one of {', '.join(PROFILES)}")
    return machine


def _factor(unit: str, table: Any, found: Analysis) -> float:
    """What a loss in nats is multiplied by for ``unit``. Raises ValueError where the runs do not say it."""
    if unit != "bits_per_byte":
        return 1.0 if unit == "nats" else 1 / math.log(2)
    known = None if table is None or "bits_per_byte" not in table else (table["bits_per_byte"] / table["loss"]).dropna()
    if known is None or not len(known) or np.ptp(known) > 1e-3 * known.mean():
        raise ValueError(
            f"{found.observations.source}: --unit is bits_per_byte, and the runs do not say one number of bytes a "
            "token: write nats or bits"
        )
    return float(known.median())


def advise_between(comparison: Any, first: str, second: str) -> Answer:
    """Which of two groups of a ``scaling.compare`` to train, from which compute on, with which probability."""
    return groups.of_groups(comparison, first, second)


@terminal.outliving_its_reader()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return fitting.on_source(_run, _parser().parse_args(argv))


def amount(text: str) -> float:
    """A number as a table may write it: 1e15, 13B, 2T."""
    value = parse(text)
    if value is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no number: write 1e15, 13B or 2T")
    return value


def _batch(text: str) -> float | str:
    """A number of tokens, or that the runs say it."""
    return text if text == FITTED else amount(text)


def seconds(text: str) -> float:
    """A time as 30d, 12h, 90m or 3600 (seconds)."""
    found = re.fullmatch(r"([\d.eE+]+)\s*([smhdw]?)", text)
    try:
        return float(found[1]) * _SECONDS[found[2] or "s"]  # type: ignore[index]  # else TypeError
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is no time: write 30d, 12h, 90m or seconds") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scaling.advise", description="What to do, by the laws of a results folder or a table of runs."
    )
    parser.add_argument("source", metavar="SOURCE", help="as of python -m scaling.fit, or the fit.json it wrote")
    add_hardware(parser)
    options: list[tuple[str, Callable[[str], Any], str]] = [
        ("flops", amount, "a training budget in FLOPs"),
        ("dollars", amount, "… in dollars, on --hardware"),
        ("hours", amount, "… in hours of --devices of --hardware"),
        ("loss", amount, "a loss to reach, in --unit"),
        ("tokens", amount, "the tokens there are"),
        ("unique-tokens", amount, "how many of them are different"),
        ("num-params", amount, "a size of model"),
        ("inference-tokens", amount, "to serve, at the quality of --flops, --loss or --num-params"),
        ("deadline", seconds, "30d, 12h: with --devices and --hardware"),
        ("share-read", float, "of inference tokens, those of prompts (default: 0)"),
        ("prefill-mfu", float, "share of the peak in reading prompts (default: as training)"),
        ("decoding-mfu", float, "share of the peak in writing answers"),
        ("decode-batch", amount, "sequences decoded at once, where --decoding-mfu is not known"),
        ("bytes-per-weight", float, "of served weights, with --decode-batch"),
        ("serving-price", amount, "dollars per device-hour of inference (default: as training)"),
        ("device-batch", amount, f"least tokens of a step that keep a device busy (default: {DEVICE_BATCH:g})"),
        ("critical-batch", _batch, f"B_crit in tokens, not Kaplan et al.'s law; {FITTED}: of these runs' batches"),
    ]
    for name, kind, text in options:
        parser.add_argument(f"--{name}", type=kind, help=text)
    parser.add_argument("--value", action="store_true", help="what a doubling of N, D and C is worth")
    parser.add_argument("--downstream", metavar="COLUMN", help="… also in this error, by its law of the loss")
    parser.add_argument("--compare", nargs=2, metavar="GROUP", help="which of two groups from which C on")
    parser.add_argument("--by", metavar="COLUMN", help="whose values the groups are (default: as the folder's fit)")
    parser.add_argument("--unit", default="nats", choices=UNITS, help="of losses (default: nats)")
    add_fit(parser)
    return parser


def add_hardware(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say on what FLOPs are counted in hours and dollars (``Machine``)."""
    parser.add_argument("--hardware", help=f"one of {', '.join(PROFILES)}")
    parser.add_argument("--devices", type=amount, help="how many (default: 1)")
    parser.add_argument("--price", type=amount, help="dollars per device-hour, instead of the profile's")
    parser.add_argument("--mfu", type=float, help="share of the peak that training reaches, instead of published ones")


def add_fit(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the fit that an answer is from, and where it is written."""
    parser.add_argument("--law", nargs="+", help="as of python -m scaling.fit (default: as the folder's fit)")
    said = "resamples (default: as the folder's own fit, else 1000; 0: the delta method)"
    parser.add_argument("--bootstrap", type=int, metavar="N", help=said)
    parser.add_argument("--json", metavar="FILE", help="also write the answer there")


def write_json(path: str, answer: Mapping[str, Any]) -> None:
    """Writes an answer, null where a number is not finite, and says where."""
    records.write_json(storage.folder(path), finite(answer))
    print(f"\nwritten: {path}")


def _run(arguments: argparse.Namespace) -> None:
    source, options = of_source(arguments)
    if arguments.compare is not None:
        pair, column = pair_of(arguments.compare, arguments.by)
        column = column or column_of(source, pair)
        table = fitting.read(source, column)[0]
        answer = advise_between(compare_groups(table, column, **fitting.compared_as(options)), *pair)
    else:
        asked = {k: v for k, v in vars(arguments).items() if k not in _NOT_ASKED}
        question = Question({"num_tokens": asked.pop("tokens"), **asked})
        table, curves, _ = fitting.read(source)
        answer = question.answer(analyse(table, curves, **{"laws": DEFAULT_LAWS} | options), table)
    printed.show_answer(terminal.console(sys.stdout, width=160, fold=False), answer)
    if arguments.json:
        write_json(arguments.json, answer.to_json())


def of_source(arguments: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """SOURCE, and how it is fitted: options of ``analyse``, of a results folder or a fit.json as that fit was asked."""
    given = storage.folder(arguments.source)
    source = runs_of(given)
    fitted = given.parent if given.name == FIT else source
    is_folder = fitted.is_dir() or storage.is_remote(fitted)
    options = fitting.asked(fitted) if is_folder else {}  # --num-params is a question here
    if (laws := arguments.law or options.pop("laws", None)) is not None:
        options["laws"] = tuple(laws)
    return source, {**options, **resamples_of(arguments), "source": str(source)}


def resamples_of(arguments: argparse.Namespace) -> dict[str, int]:
    """The option of a fit that --bootstrap is; none where it was not written."""
    return {} if arguments.bootstrap is None else {"bootstrap": arguments.bootstrap}


_NOT_ASKED = {"source", "law", "bootstrap", "json", "compare", "by"}


def runs_of(source: Path) -> Path:
    """The results folder that a fit.json was made from; another SOURCE as it is. Raises ValueError where its runs are
    not beside it: draws and other forms are not in the file."""
    if source.name != FIT:
        return source
    for folder in (source.parent, source.parent.parent):
        if (folder / "runs").is_dir():
            return folder
    known = records.read_json(source)
    table = Path(str(known.get("source", "")))
    for path in (source.parent / table.name, table):
        if table.suffix and path.is_file():
            rows = known.get("num_observations", 0) + len(known.get("excluded") or ())
            if rows != (there := len(fitting.read(path)[0])):
                raise ValueError(f"{source}: it is of {rows} runs, and {path} has {there}: write the table as SOURCE")
            return path
    raise ValueError(f"{source}: its runs are not beside it, and intervals are made from them: write them as SOURCE")


def pair_of(names: Sequence[str], by: str | None) -> tuple[tuple[str, str], str | None]:
    """The two groups that --compare names, and the column whose values they are: of --by or of COLUMN=VALUE, None where
    neither is written. Raises ValueError for two columns."""
    columns = sorted({column for column in (*(name.rpartition("=")[0] for name in names), by) if column})
    if len(columns) > 1:
        said = f"--compare {' '.join(names)}: of two columns ({', '.join(columns)})"
        raise ValueError(f"{said}: write two values of one")
    first, second = (name.rpartition("=")[2] for name in names)
    return (first, second), columns[0] if columns else None


def column_of(source: Path, pair: Sequence[str]) -> str:
    """The column by which a results folder's own fit compares groups. Raises ValueError where it compares none."""
    known = records.read_json(source / FIT).get("multiplier") if source.is_dir() else None
    if not known:
        raise ValueError(f"--compare {' '.join(pair)}: add --by, the column whose values these are")
    return str(known["column"])


class Called(ModuleType):
    """A command's module that is a function's name in the package, too: called, it is its function of that name."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return vars(self)[self.__name__.rpartition(".")[2]](*arguments, **options)


sys.modules[__name__].__class__ = Called

if __name__ == "__main__":
    sys.exit(main())
