"""Imports point one way (the house's first rule), and what is heavy is imported where it is first used.

    fields, storage, numbers, parts ← families, objectives ← config, execution ← accounting, records ← grid ← data
    data ← training ← engine ← conclusion, rounds ← sweep
    records ← laws ← report ← fit ← conclusion
    fit ← advise ← study; advise, engine ← design

The graph is read from the source, imports inside functions included: a cycle hidden in a function is still a cycle.
"""

import ast
import functools
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"tensorflow_datasets", "tensorflow", "pandas", "matplotlib", "pydantic", "yaml"}
DEVICE = {"jax", "jaxlib", "flax", "optax", "orbax"}
GROUND = {"fields", "config", "storage", "machine", "terminal", "numbers", "parts", "devices"}
CORE = GROUND | {"families", "objectives", "execution", "accounting", "records", "grid"}
ANALYSIS = {"laws", "report", "fit", "advise", "study"}

# For each part, the parts it may import: those of the layers below. A part is a folder, or a module at the top.
MAY_IMPORT = {
    "fields": set(),
    "families": {"fields"},
    "objectives": {"fields", "families"},
    "config": {"fields", "families", "objectives"},
    "storage": set(),
    "machine": set(),
    "terminal": set(),
    "numbers": set(),
    "parts": set(),
    "devices": set(),
    "execution": {"fields", "devices"},
    "accounting": {"fields", "families", "objectives", "config"},
    "records": {"fields", "parts", "objectives", "config", "storage", "accounting"},
    "grid": {"fields", "numbers", "families", "objectives", "config", "execution", "accounting"},
    "laws": {"records", "numbers", "parts"},
    "report": GROUND | {"records", "laws"},
    "fit": GROUND | {"records", "laws", "report"},
    "advise": GROUND | {"records", "laws", "report", "fit"},
    "study": GROUND | {"records", "laws", "report", "fit", "advise"},
    "data": CORE,
    "training": CORE | {"data"},
    "engine": CORE | {"data", "training"},
    "design": CORE | {"data", "training", "engine", "laws", "report", "fit", "advise"},
    "bench": CORE | {"data", "training", "engine", "laws"},
    "conclusion": CORE | {"laws", "report", "fit", "engine"},
    "rounds": CORE | {"laws", "training", "engine"},
    "sweep": CORE | {"data", "laws", "training", "engine", "conclusion", "rounds"},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / "scaling").rglob("*.py"))}


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@functools.cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


@functools.cache
def imports(module: str, *, top_level_only: bool = False, for_types_too: bool = False) -> frozenset[str]:
    """Modules that the source of ``module`` imports; those under ``if TYPE_CHECKING`` if asked."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (
                importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                if node.level
                else node.module
            )
            for alias in node.names:  # a name may be a module of the package or something inside it
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in MODULES else base)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not for_types_too:
            return
        if top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree_of(module))
    return frozenset(found)


def test_the_rules_know_every_part():
    parts = {part_of(module) for module in MODULES} - {""}
    assert parts <= set(MAY_IMPORT), "a new part needs a line in MAY_IMPORT: decide which way its imports point"


@pytest.mark.parametrize("module", [m for m in MODULES if part_of(m)])
def test_imports_point_one_way(module):
    allowed = MAY_IMPORT[part_of(module)] | {part_of(module)}
    wrong = {
        name for name in imports(module) if name.partition(".")[0] == "scaling" and part_of(name) not in allowed | {""}
    }
    assert not wrong, f"{module} imports {sorted(wrong)}; it may import {sorted(allowed)}"


def test_there_is_no_cycle():
    """Not even for the sake of a type: two modules that name each other's types are one."""
    wanted = {m: imports(m, top_level_only=True, for_types_too=True) for m in MODULES}
    graph = {m: {name for name in names if name in MODULES and name != m} for m, names in wanted.items()}
    while leaves := [m for m, wants in graph.items() if not wants]:
        graph = {m: wants - set(leaves) for m, wants in graph.items() if m not in leaves}
    assert not graph, f"modules that import each other: {sorted(graph)}"


@pytest.mark.parametrize("module", [m for m in MODULES if part_of(m) in CORE | {"data", "training", "engine"}])
def test_heavy_packages_are_imported_where_they_are_used(module):
    packages = {name.partition(".")[0] for name in imports(module, top_level_only=True)}
    assert not packages & HEAVY


@pytest.mark.parametrize("module", [m for m in MODULES if part_of(m) in CORE | ANALYSIS])
def test_analysis_touches_no_device_code(module):
    packages = {name.partition(".")[0] for name in imports(module)}
    assert not packages & DEVICE


@pytest.mark.parametrize("module", MODULES)
def test_nothing_unpickles_or_evaluates(module):
    called = {n.func.id for n in ast.walk(tree_of(module)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert not called & {"eval", "exec", "__import__"}
    assert not {name.partition(".")[0] for name in imports(module)} & {
        "pickle",
        "cloudpickle",
        "dill",
        "shelve",
        "marshal",
    }


TRAINING = [m for m in MODULES if part_of(m) == "training"]


def loaded_by(modules: list[str], watched: set[str], after: tuple[str, ...] = ()) -> set[str]:
    """Which of ``watched`` a fresh interpreter loads for ``modules``, beyond what it has loaded for ``after``."""
    script = f"""
import importlib, sys
for name in {after!r}: importlib.import_module(name)
before = set(sys.modules)
for name in {modules!r}: importlib.import_module(name)
print(*({watched!r} & (set(sys.modules) - before)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.skipif(not TRAINING, reason="scaling.training is not there yet")
def test_training_imports_on_a_bare_accelerator_image():
    """What JAX's own libraries load (Flax reads YAML) is theirs; ours add none of the heavy packages to it."""
    assert not loaded_by(TRAINING, HEAVY, after=("jax", "flax.linen", "optax", "orbax.checkpoint"))


def test_analysis_never_loads_jax():
    """A notebook beside a training run must not take the GPU's memory."""
    assert not loaded_by([m for m in MODULES if part_of(m) in ANALYSIS | CORE], DEVICE)
