"""What texts point at is there: files and links of the Markdown, modules and names of docstrings and comments."""

import ast
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "scaling").rglob("*.py"))
TEXTS = sorted(p for p in [*ROOT.glob("*.md"), *(ROOT / "scaling").rglob("*.md"), *(ROOT / "results").rglob("*.md")])

# ``analysis.Analysis``, ``Analysis.to_json``, ``scaling.laws.analysis``: dotted words between double backticks.
DOTTED = re.compile(r"``([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)")
PATH = re.compile(r"`((?:scaling|tests|sweeps|notebooks|results)/[\w./-]+\.(?:py|yaml|ipynb|md|html|svg|json))`")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)")
FILES = {"json", "jsonl", "csv", "yaml", "bin", "npy", "svg", "png", "txt", "py", "html"}


def names_in(path: Path) -> set[str]:
    """Names that a module defines or imports at its top."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found.update((a.asname or a.name).partition(".")[0] for a in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found.update(n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))
    return found


def members() -> dict[str, set[str]]:
    """For every class, what its body defines and its methods set."""
    found: dict[str, set[str]] = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                mine = found.setdefault(node.name, set())
                for inner in ast.walk(node):
                    if isinstance(inner, ast.FunctionDef | ast.ClassDef):
                        mine.add(inner.name)
                    elif isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
                        mine.add(inner.target.id)
                    elif isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name):
                        mine.add(inner.attr)
    return found


MODULES: dict[str, set[str]] = {}
for _path in SOURCES:
    _name = _path.parent.name if _path.stem == "__init__" else _path.stem
    MODULES.setdefault(_name, set()).update(names_in(_path))
    MODULES.setdefault(_path.parent.name, set()).add(_path.stem)
    MODULES.setdefault(_path.parent.parent.name, set()).add(_path.parent.name)
MODULES["scaling"] |= {"fit_law", "compare"}  # imported when it is first asked for
CLASSES = members()
# ``fit.by``, ``execution.remat``: keys of a grid, which are fields of its dataclasses.
CONFIGS = [names for cls, names in CLASSES.items() if cls.endswith("Config") or cls in ("Horizon", "Grid")]
KEYS = set().union(*CONFIGS)


OTHERS = {"jax", "flax", "optax", "rich", "submitit", "pathlib", "epath", "os", "time", "table", "pandas", "package"}


def is_there(reference: str) -> bool:
    *owners, name = reference.split(".")
    owner = owners[-1]
    if owners[0] in OTHERS:
        return True
    if owner in MODULES or owner in CLASSES:
        return name in MODULES.get(owner, set()) | CLASSES.get(owner, set()) | KEYS
    return owner in KEYS or owner in {"model", "optim", "eval", "self"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_names_in_docstrings_and_comments_are_there(path):
    text = path.read_text(encoding="utf-8")
    dotted = {r for r in DOTTED.findall(text) if r.rpartition(".")[2] not in FILES}
    lost = sorted(r for r in dotted if not is_there(r))
    assert not lost, f"{path.relative_to(ROOT)} speaks of {lost}"


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_files_of_the_texts_are_there(path):
    text = path.read_text(encoding="utf-8")
    links = [link for link in LINK.findall(text) if "://" not in link and not link.startswith("mailto:")]
    lost = [link for link in links if not (path.parent / link).exists()]
    lost += [name for name in PATH.findall(text) if not (ROOT / name).exists() and "NAME" not in name]
    assert not lost


def lost_names(code: str) -> list[str]:
    """Names that code takes from modules of this package, by import or by attribute, and that are not there."""
    modules, lost = {}, []
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "scaling":
            module = importlib.import_module(node.module)
            for alias in node.names:
                path = f"{node.module}.{alias.name}"
                if hasattr(module, alias.name):
                    modules[alias.asname or alias.name] = getattr(module, alias.name)
                elif importlib.util.find_spec(path) is not None:
                    modules[alias.asname or alias.name] = importlib.import_module(path)
                else:
                    lost.append(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id)
            if isinstance(module, ModuleType) and not hasattr(module, node.attr):
                lost.append(f"{node.value.id}.{node.attr}")
    return lost


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_names_in_the_notebooks_are_there(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert not lost_names(code)


def test_the_check_sees_what_is_lost():
    assert lost_names("from scaling.report import plots, nothing\nplots.nothing(1)") == [
        "scaling.report.nothing",
        "plots.nothing",
    ]
    assert not is_there("trunks.nothing")
    assert not is_there("Manifest.nothing")
    assert is_there("trunks.share")
    assert is_there("execution.remat")
