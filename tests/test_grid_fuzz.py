"""Malformed grids by the thousand: the command answers each with exit code 2 and one line that says what to write, or
a plan; no traceback.

Valid grids are damaged as trees (types, missing and unknown keys, nesting, numbers out of range) and as text (cut,
doubled, anchors, tags, bytes that are no text), several times over.
"""

import copy
import math
from pathlib import Path
from unittest import mock

import pytest
import yaml
from hypothesis import HealthCheck, currently_in_test_context, event, given, settings
from hypothesis import strategies as st

from scaling import grid, sweep

ENGINE = Path(__file__).parent / "engine"
SEEDS = [
    """
recipe: default@1
base: {data: {seq_len: 32}, eval: {num_points: 3}, optim: {schedule: {name: cosine}}}
isoflop: {rule: exact, sizes: [8, 16, 24], budgets: [1e9, 2e9, {flops: 4e9, sizes: [8, 16]}]}
holdout: {budgets: [4e9]}
exclude: [{width: 24, budget_flops: 1e9}]
fit: {bootstrap: 20, delta: 0.001}
hardware: {name: h100, devices: 2, mfu: 0.3}
""",
    """
recipe: {name: porian@1, lr_scale: 2}
base: {model: {params: 1e4, activation: swiglu}, horizon: {tokens_per_param: 20}}
axes: {optim.beta2: [0.9, 0.99], shape: [{batch_size: 4, label: small}, {batch_size: 8, data: {seq_len: 64}}]}
seeds: [0, 1]
execution: {mesh: {data: 1}, remat: full, disk_budget_gb: 1}
hardware: {price_per_device_hour: 1.5, power_watts: 300}
""",
    """
recipe: none
base:
  model: {d_model: 16, num_layers: 2, num_heads: 2, head_dim: 8, num_kv_heads: 1, d_ff: 64, vocab_size: 256}
  optim: {peak_lr: 0.01, warmup_tokens: 0, name: adamw, schedule: {name: wsd, cooldown_fraction: 0.2}}
  horizon: {steps: 300}
  batch_size: 4
  divergence: {loss: 9.0}
""",
    """
recipe: {name: default@1, lr_scale: 2}
base: {model: {activation: gelu}, data: {seq_len: 128}, optim: {schedule: {name: wsd}}}
isoflop: {rule: exact, budgets: [3e11, {flops: 6e11, sizes: [24, {params: 5e4}]}], sizes: [16]}
axes: {recipe.batch_scale: [0.5, 1], arm: [{optim: {beta1: 0.9}}, {optim: {beta1: 0.8}, label: b}]}
seeds: [0, 1]
exclude: [{batch_scale: 0.5, width: 16}]
holdout: {budgets: [6e11], cells: [{size: 16x2, seed: 1}]}
execution: {mesh: {data: 1}}
fit: {flops: exact, bootstrap: 20}
""",
]
TREES = {text: yaml.safe_load(text) for text in SEEDS}
ARGUMENTS = [
    [],
    ["--hardware", "tpu-v6e", "--devices", "4"],
    ["--hardware", "cpu", "--budget-hours", "1e-3", "--drop", "--price", "1", "--budget-dollars", "5"],
    ["--hardware", "cpu", "--strict"],
]

numbers = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([0, -1, 2**31, 10**30, 10**400, 1e308, -1e308, 1e-320, 0.5, math.nan, math.inf, -math.inf]),
)
WORDS = [
    "", "1e17", "3e-3", "exact", "none", "default@1", "no", "é", "\x00", "a\nb", "x" * 300, "[", "text:/", "wsd",
    "NaN", "..", "16x2", "width", "params", "d_model", "head_dim", "horizon", "tokens", "flops", "steps", "seed",
    "null", "name", "sizes", "label", "model", "model.width", "optim", "base", "recipe", "recipe.lr_scale",
]  # fmt: skip
words = st.one_of(st.sampled_from(WORDS), st.text(max_size=8))
leaves = st.one_of(st.none(), st.booleans(), numbers, words)
junk = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(words, st.integers(0, 3)), inner, max_size=4)
    ),
    max_leaves=8,
)


PIECES = [
    b"", b"&a ", b"*a ", b"<<: *a\n", b"!!python/object:os.system ", b"\t", b"- ", b": ", b"\r", b"{" * 50, b"\n---\n",
    b"\xff\xfe", b"? ", b"| ", b"1" * 5000, b".inf", b"!!binary x", b"seeds: [1]\n", b":", b"{", b"}", b"[", b"]", b"&",
    b"*", b"!", b"|", b">", b"'", b'"', b"#", b"%", b"@",
]  # fmt: skip


def nodes(tree, path=()):
    """Paths of every node of a tree, its root first."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from nodes(value, (*path, key))


def replaced(tree, path, value):
    if not path:
        return value
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    if value is replaced:  # nothing in its place
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return tree


@st.composite
def damaged_trees(draw):
    tree = copy.deepcopy(TREES[draw(st.sampled_from(SEEDS))])
    for _ in range(draw(st.integers(0, 3))):
        places = list(nodes(tree))
        path = draw(st.sampled_from(places))
        here = tree
        for key in path:
            here = here[key]
        how = draw(st.sampled_from(["junk", "number", "remove", "double", "wrap", "nest", "add", "move"]))
        if how == "junk":
            tree = replaced(tree, path, draw(junk))
        elif how == "number":
            tree = replaced(tree, path, draw(numbers))
        elif how == "remove" and path:
            tree = replaced(tree, path, replaced)
        elif how == "double" and isinstance(here, list) and here:
            here.append(copy.deepcopy(here[-1]))
        elif how == "wrap":
            tree = replaced(tree, path, draw(st.sampled_from([[here], {"model": here}, {"flops": here}, [here, here]])))
        elif how == "nest":
            deep = here
            for _ in range(draw(st.sampled_from([5, 60, 400]))):
                deep = [deep] if draw(st.booleans()) else {"base": deep}
            tree = replaced(tree, path, deep)
        elif how == "add" and isinstance(here, dict):
            key = draw(st.one_of(words, st.sampled_from([p[-1] for p in places if p] or ["base"])))
            here[key] = draw(junk)
        elif how == "move":
            tree = replaced(tree, path, copy.deepcopy(tree))
    return tree


@st.composite
def damaged_texts(draw) -> bytes:
    try:
        text = yaml.safe_dump(draw(damaged_trees()), sort_keys=False, allow_unicode=draw(st.booleans()))
    except (yaml.YAMLError, RecursionError, ValueError):
        text = draw(st.sampled_from(SEEDS))
    raw = text.encode("utf-8", errors="surrogatepass")
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        at = draw(st.integers(0, len(raw)))
        end = min(len(raw), at + draw(st.integers(0, 12)))
        piece = draw(
            st.one_of(
                st.binary(max_size=6),
                st.sampled_from([*PIECES, raw]),
            )
        )
        raw = raw[:at] + piece + raw[end:]
    return raw


def plan_one(raw: bytes, argv: list[str], capsys) -> int:
    Path("g.yaml").write_bytes(raw)
    load, refusals = grid.load, []  # why the file is no grid, or None, of each time it is read

    def listened(*args):
        refusals.append(None)
        try:
            return load(*args)
        except grid.GridError as e:
            refusals[-1] = str(e)
            raise

    with mock.patch.object(grid, "load", listened):
        code = sweep.main(["--grid", "g.yaml", "--plan", "--executor", "inline", *argv], loop="fake_loop")
    (refused,) = refusals
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert code in (sweep.DONE, sweep.BAD_INPUT), (code, err)
    if code == sweep.BAD_INPUT:
        assert err.startswith("error: "), err
        assert err.count("\n") == 1, err
        assert len(err) < 2000, err
        assert err.isprintable() or err[:-1].isprintable(), repr(err)
        if refused is not None:
            assert err == f"error: {refused}\n"
            assert any(word in refused for word in (";", ": write", "is not one of")), f"no remedy in {err!r}"
    else:
        assert refused is None
        assert err == ""
    if currently_in_test_context():
        event(f"exit {code}")
    return code


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SCALING_CACHE", raising=False)
    monkeypatch.syspath_prepend(str(ENGINE))
    import driver

    driver.install(monkeypatch.setitem, lambda *args: monkeypatch.setattr(*args, raising=False))
    monkeypatch.setenv("FAKE_STEP_SECONDS", "1e-4")


SETTINGS = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


@pytest.mark.slow
@settings(max_examples=200, **SETTINGS)
@given(raw=damaged_texts(), argv=st.sampled_from(ARGUMENTS))
def test_a_malformed_grid_is_one_line_with_a_remedy_or_a_plan(here, capsys, raw, argv):
    plan_one(raw, argv, capsys)


@pytest.mark.slow
@settings(max_examples=2000, **SETTINGS)
@given(raw=damaged_texts(), argv=st.sampled_from(ARGUMENTS))
def test_thousands_of_malformed_grids_are_one_line_with_a_remedy_or_a_plan(here, capsys, raw, argv):
    plan_one(raw, argv, capsys)


@pytest.mark.parametrize("text", SEEDS)
@pytest.mark.parametrize("argv", ARGUMENTS[:2])
def test_what_is_damaged_was_whole(here, capsys, text, argv):
    assert plan_one(text.encode(), argv if argv else ["--hardware", "cpu"], capsys) == sweep.DONE


@pytest.mark.parametrize(
    "raw", [b"", b"\n", b"# nothing\n", b"---\n---\n", b"\x00", b"\xff\xfe\x00", b"null", b"[]", b"&a [*a]"]
)
def test_an_empty_or_binary_file_is_one_line(here, capsys, raw):
    assert plan_one(raw, [], capsys) == sweep.BAD_INPUT
