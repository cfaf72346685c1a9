"""Tables as people have them → the numbers that are in them, or one line.

The oracle is the table that a file was written from: every writing of it gives the same numbers or is refused.
"""

import csv
import io
import json
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import scaling
from scaling import fit
from scaling.laws.tables import units
from scaling.laws.tables.columns import meaning
from scaling.laws.tables.observations import from_table, read_csv
from tests import published
from tests.laws import data

N = [20_000_000, 53_300_000, 125_000_000, 350_000_000, 1_400_000_000, 90_500_000]
D = [400_000_000, 1_100_000_000, 2_500_000_000, 7_000_000_000, 28_000_000_000, 2_000_000_000]
LOSS = [5.96286, 5.27627, 4.65813, 4.25781, 3.91234, 4.90017]


def read(tmp_path, text, name="runs.csv"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return from_table(read_csv(path), source=name)


def holds(observations):
    np.testing.assert_array_equal(observations.columns["num_params"], N)
    np.testing.assert_array_equal(observations.columns["num_tokens"], D)
    np.testing.assert_array_equal(observations.loss, LOSS)


def rows(delimiter=",", header=("num_params", "num_tokens", "loss"), end=""):
    lines = [delimiter.join(header), *(delimiter.join(map(str, r)) + end for r in zip(N, D, LOSS))]
    return "\n".join(lines) + "\n"


def suffixed(number, mark):
    unit, size = ("B", 1e9) if number >= 1e9 else ("M", 1e6)
    return f"{number / size:.12g}".replace(".", mark) + unit


NUMBERS = {
    "plain": lambda x, mark: str(x),
    "power": lambda x, mark: f"{x:.9e}".replace(".", mark),
    "suffix": suffixed,
    "thousands": lambda x, mark: f"{x:,}".replace(",", "." if mark == "," else ","),
    "blanks": lambda x, mark: f"{x:,}".replace(",", "\u202f"),
}
HEADERS = [
    ("num_params", "num_tokens", "loss"), ("N", "D", "L"), ("n_params", "train_tokens", "val_loss"),
    ("Params", "Tokens", "Val Loss"), ("config.n_params", "summary.tokens_seen", "summary.eval/loss"),
    ("parameter_count", "throughput/total_tokens", "eval/paloma/macro_loss"), ("nParams", "numTokens", "finalLoss"),
]  # fmt: skip


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from([",", ";", "\t", "|"]), st.sampled_from([".", ","]), st.sampled_from(HEADERS),
    st.sampled_from(list(NUMBERS)), st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]), st.permutations(range(4)),
    st.booleans(), st.integers(3, 5),
)  # fmt: skip
def test_any_writing_of_a_table_gives_its_numbers_or_one_line(
    tmp_path_factory, delimiter, mark, header, number, encoding, order, quoted, digits
):
    write = NUMBERS[number]
    loss = [round(x, digits) for x in LOSS]
    columns = [
        (header[0], [write(x, mark) for x in N]), (header[1], [write(x, mark) for x in D]),
        (header[2], [str(x).replace(".", mark) for x in loss]), ("run", [f"try #{i}; 2,5" for i in range(len(N))]),
    ]  # fmt: skip
    columns = [columns[i] for i in order]
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, quoting=csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL)
    writer.writerows([[name for name, _ in columns], *zip(*(values for _, values in columns))])
    folder, text = tmp_path_factory.mktemp("t"), out.getvalue().encode(encoding)
    try:
        found = read(folder, text)
    except ValueError:
        if digits != 3:  # three decimals may be thousands: everything else here can be told
            raise
        with pytest.raises(ValueError, match=r"^[^\n]* could be [^\n]*: write decimal points[^\n]*$"):
            read(folder, text)
        return
    np.testing.assert_array_equal(found.columns["num_params"], N)
    np.testing.assert_array_equal(found.columns["num_tokens"], D)
    np.testing.assert_array_equal(found.loss, loss)


@pytest.mark.parametrize("orient", ["records", "columns", "index", "split", "table", "list", "lines"])
def test_json_in_any_orient(orient, tmp_path):
    table = pd.DataFrame({"n_params": N, "tokens": D, "val_loss": LOSS})
    if orient == "list":
        text = table.to_dict(orient="list") and json.dumps(table.to_dict(orient="list"))
    elif orient == "lines":
        nested = [{"config": {"n_params": n}, "summary": {"tokens": d, "loss": x}} for n, d, x in zip(N, D, LOSS)]
        text = "\n".join(map(json.dumps, nested))
    else:
        text = table.to_json(orient=orient)
    holds(read(tmp_path, text, "runs.json"))


def test_units_in_a_name_are_applied_and_said(tmp_path):
    text = "params (M),tokens_b,loss\n" + "".join(f"{n / 1e6!r},{d / 1e9!r},{x}\n" for n, d, x in zip(N, D, LOSS))
    found = read(tmp_path, text)
    np.testing.assert_allclose(found.columns["num_params"], N, rtol=1e-15)
    np.testing.assert_allclose(found.columns["num_tokens"], D, rtol=1e-15)
    assert "params (M) as num_params × 1e+06" in found.warnings[0]


@pytest.mark.parametrize(
    "text, message",
    [
        (rows().replace("\n2", "\n7,2", 1), "row 1 has 4 fields and the header has 3"),
        (rows(header=("num_params", "num_tokens", "loss", "note"), end=",a") + "1e9,2e9,3\n", "row 7 has 3 fields"),
        (rows().split("\n", 1)[1], "its first line is numbers"),
        ("N,D,loss,val_loss\n" + "1e9,2e9,3,3.1\n" * 3, "columns loss, val_loss could each be loss"),
        ("N,D,train_loss,val_loss\n" + "1e9,2e9,3,3.1\n" * 3, "train_loss, val_loss could each be loss"),
        ("n_params,total_params,D,loss\n1e8,2e8,2e9,3\n", "n_params, total_params could each be num_params"),
        ("N,D,loss,loss\n1e9,2e9,3,4\n", "two columns are named loss and differ"),
        ("N,D,loss,holdout\n1e9,2e9,3,perhaps\n", "holdout is 'perhaps': write yes or no"),
        ("N,D,loss,status\n1e9,2e9,3,sleeping\n", "status is 'sleeping'"),
        ("N,D,loss,split\n1e9,2e9,3,c4\n1e9,3e9,3,pile\n", "is split (c4, pile) what is fitted"),
        ("N,D,loss,split\n1e9,2e9,3,train\n1e9,2e9,3.1,val\n", "on both sides"),
        ('N,D,loss\n"1e9","1,234",2.125\n', "1,234 could be 1234 or 1.234"),
        ('N,D,loss\n1e9,2e9,"5,96286"\n1e9,2e9,5.96286\n', "a decimal point and"),
        ("N,D,a,b,c,d,e\n" + "1,2,3,4,5,6,7\n", "(there is num_params, num_tokens, a, b, c and 2 more)"),
        ("n_params,tokens,val_bpb\n1e8,1e9,1\n", "if it is in val_bpb, rename that to loss"),
        ('{"N": 1, "N": 2}', "an object names N twice"),
        ('{"N": 1}\n{"N": \n', "line 2 is not JSON"),
        (b"PK\x03\x04", "an Excel workbook or a zip"),
    ],
)
def test_what_cannot_be_told_is_refused_in_one_line(text, message, tmp_path, capsys):
    path = tmp_path / "bad.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert fit.main([str(path), "--bootstrap", "0", "--no-figures"]) == 2
    out, error = capsys.readouterr()
    assert message in error
    assert error.startswith(str(path))
    assert error.count("\n") == 1
    assert not out
    assert not (tmp_path / "fit.json").exists()


def test_only_a_line_that_begins_with_a_hash_is_a_comment(tmp_path):
    text = "# a comment\nrun,N,D,loss\n" + "".join(
        f"try #{i},{n},{d},{x}\n" for i, n, d, x in zip(range(6), N, D, LOSS)
    )
    found = read(tmp_path, text)
    holds(found)
    assert found.run.tolist() == [f"try #{i}" for i in range(6)]
    hidden = read(tmp_path, text.replace("try #2", "#2"))
    assert len(hidden) == 5
    assert "1 lines among the rows begin with #" in hidden.warnings[0]


def test_fields_after_a_last_delimiter_and_an_index_are_not_read(tmp_path):
    holds(read(tmp_path, rows(end=",")))
    holds(read(tmp_path, rows(header=("num_params", "num_tokens", "loss", ""), end=",")))
    holds(read(tmp_path, pd.read_csv(io.StringIO(rows())).to_csv()))
    holds(read(tmp_path, rows(delimiter=" ")))
    holds(read(tmp_path, "sep=;\n" + rows(delimiter=";")))


@pytest.mark.parametrize(
    "scale, words",
    [
        ((1e-9, 1e-9), ("num_params is 0.02", "billions")),
        ((1e-6, 1e-6), ("num_params is 20 to 1400", "millions")),
        ((1e-6, 1), ("num_params is 20 to 1400", "millions")),
        ((1, 1e-9), ("num_tokens is 0.4 to 28", "billions")),
        ((1, 1e-6), ("num_tokens is 400 to 2.8e+04", "millions")),
    ],
)
def test_sizes_in_another_unit_are_refused_with_its_name(scale, words):
    table = pd.DataFrame({"N": np.multiply(N, scale[0]), "D": np.multiply(D, scale[1]), "loss": LOSS})
    with pytest.raises(ValueError, match=".*".join(map(re.escape, words))):
        from_table(table)


def test_models_of_a_thousand_parameters_on_bytes_are_in_ones():
    """The head (256 bytes × 8) is most of each model: C is 6 (N + H) D."""
    n, d = np.meshgrid([300.0, 1e3, 4e3], [3e5, 1e6, 1e7])
    n, d = n.ravel(), d.ravel()
    units.check(n, d, "table")
    assert units.cost_note(n, d, 6 * (n + 2e5) * d) is None
    assert "PF-days" in units.cost_note(n, d, 6 * n * d / 8.64e19)
    assert "GFLOP" in units.cost_note(n, d, 6 * n * d / 1e9)


def test_a_tiny_table_is_in_ones_where_it_says_so():
    """A thousand parameters on 50,000 tokens: refused without the word, as billions and millions look the same."""
    n, d = np.meshgrid([300.0, 1e3, 4e3], [2e4, 5e4])
    table = pd.DataFrame({"num_params": n.ravel(), "num_tokens": d.ravel(), "loss": 2 + n.ravel() ** -0.3})
    with pytest.raises(ValueError, match="num_params_ones if so it is"):
        from_table(table)
    for name in ("num_params_ones", "params (ones)"):
        np.testing.assert_array_equal(
            from_table(table.rename(columns={"num_params": name})).columns["num_params"], n.ravel()
        )


def test_words_of_trackers_from_python_and_tokens_from_compute():
    table = data.scattered(12)
    C = 6 * table["num_params"] * table["num_tokens"]
    words = {"State": ["finished"] * 9 + ["crashed"] * 3, "Held Out": ["no"] * 8 + ["yes"] * 4}
    found = from_table(pd.DataFrame({"n_params": table["num_params"], "C": C, "val_loss": table["loss"], **words}))
    assert len(found) == 8
    assert [row["reason"] for row in found.excluded] == ["holdout"] + ["crashed"] * 3
    np.testing.assert_allclose(found.columns["num_tokens"], table["num_tokens"][:8], rtol=1e-14)
    assert "there is no num_tokens: D = C / (6 N)" in found.warnings


def test_a_named_fit_is_that_of_the_mapped_table():
    table = data.scattered(30, noise=0.01)
    other = table.rename(columns={"num_params": "n_params", "num_tokens": "tokens", "loss": "eval/loss"})
    assert scaling.fit_law(other).params == scaling.fit_law(table).params


def test_the_best_setting_of_each_cell_is_fitted_and_a_law_of_the_rate_takes_all():
    cells = data.scattered(4)
    table = cells.loc[cells.index.repeat(3)].assign(lr=[1, 2, 3] * 4)
    table["loss"] *= 1 + 0.01 * (table["lr"] - 2) ** 2
    found = from_table(table)
    assert sorted(found.loss) == sorted(cells["loss"])
    assert "the best of each" in found.warnings[0]
    assert len(from_table(table, columns=("lr",))) == 12


# Headers of public exports: a tracker's sweep, scripts that append rows, studies' tables.
EXPORTS = {
    "Name,parameter_count,throughput/total_tokens,eval/paloma/macro_loss,throughput/total_gflops,"
    "trainer.train_batch_size": "ndlg",
    "source,provenance,dataset,model,condition,experiment,tokens,params,budget,loss": "ndl",
    "job_name,N,N_approx,D,C,lr,gbsz,beta2,seed,iteration,train_samples,train_tokens,loss,loss_se": "ndlc",
    "x,y,color,N,C,hex_color,loss": "nlc",
    "flops_budget,depth,model_dim,num_scaling_params,num_iterations,tokens_trained,param_data_ratio,val_loss": "ndlc",
    "loss,C4 Eval Loss,N,N_no_emb,D,C,C_no_emb,C_6ND,portion_steps_elapsed,model,train_tokens,peak_lr": "ndlc",
}
PARTS = {
    "n": {"parameter_count", "params", "N", "num_scaling_params"}, "l": {"loss", "val_loss", "eval/paloma/macro_loss"},
    "d": {"throughput/total_tokens", "tokens", "D", "tokens_trained"}, "c": {"C", "flops_budget"},
    "g": {"throughput/total_gflops"},
}  # fmt: skip


@pytest.mark.parametrize("header", EXPORTS)
def test_public_exports_are_read_at_first_try(header, tmp_path):
    names, n = header.split(","), len(N)
    C = [6.0 * a * b for a, b in zip(N, D)]
    values = {"n": N, "d": D, "l": LOSS, "c": C, "g": [c / 1e9 for c in C]}
    lines = [header]
    for i in range(n):
        part = {name: next((k for k, v in PARTS.items() if name in v), None) for name in names}
        lines.append(",".join(str(values[part[x]][i]) if part[x] else {"seed": "1"}.get(x, f"{i}.5") for x in names))
    found = read(tmp_path, "\n".join(lines) + "\n")
    np.testing.assert_allclose(found.columns["num_params"], N)
    np.testing.assert_allclose(found.columns["num_tokens"], D)
    np.testing.assert_allclose(found.columns["flops"], C)
    np.testing.assert_array_equal(found.loss, LOSS)


FILES = {
    "datablations_182.csv": 182, "design_data_constrained.csv": 161, "design_lr_batch.csv": 41,
    "design_parallel.csv": "num_tokens is missing", "design_vocab.csv": "num_params, num_tokens, loss is missing",
    "distillation.csv": "there is NS, DS, LT, LS, split", "epoch_chinchilla.csv": 245,
    "fine_tuning.csv": "num_params, num_tokens is missing",
    "gadre_overtraining.csv": "could each be loss and differ: rename the one to fit to loss", "gemstones.csv": 1588,
    "mpl_lr_annealing_curves.csv": "num_params, num_tokens is missing", "sparsity_t5.csv": "num_params, num_tokens",
    "sparsity_vit.csv": "num_params, num_tokens",
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_published_files_are_read_or_say_what_to_rename(name):
    path = published.path(name)
    if isinstance(FILES[name], int):
        assert len(from_table(read_csv(path))) == FILES[name]
    else:
        with pytest.raises(ValueError, match=FILES[name]):
            from_table(read_csv(path))


def test_names_that_say_something_else_are_left_alone():
    for name in (
        "d",
        "n",
        "l",
        "d_model",
        "tokens_per_param",
        "batch_tokens",
        "eval/num_tokens",
        "flops_per_s",
        "num_params_total",
        "flops_6ND",
        "loss_standard_error",
        "N_no_emb",
        "tflops",
        "unique_tokens_seen",
    ):
        assert meaning(name) is None, name  # fmt: skip
