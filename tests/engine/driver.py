"""``python driver.py …``: the sweep command around a training loop of hashes (fake_loop), instant laws and report."""

import importlib
import signal
import sys
import types
from pathlib import Path

from scaling import records, sweep
from scaling.engine.slurm import follow


def analyse(table, curves=None, **options):
    done = table[(table.status == "completed") & ~table.holdout]
    if len(done) < 3:
        raise ValueError(f"{len(done)} completed runs: write a grid with at least 3")
    payload = {"schema": 1, "source": options["source"], "num_observations": len(done), "laws": {}, "warnings": []}
    return types.SimpleNamespace(to_json=lambda: payload, mean=float(done.loss.mean()), fits={}, surface=None)


def forecast(analysis, cells, level):
    return [
        {
            "run_id": c["run_id"],
            "flops": c["flops"],
            "predicted": analysis.mean,
            "interval": [analysis.mean - 1, analysis.mean + 1],
        }
        for c in cells
    ]


def show(console, payload):
    console.print(f"laws of {payload['num_observations']} runs")
    for line in payload["warnings"]:
        console.print(line)
    for entry in payload["forecast"]:
        console.print(f"forecast {entry['run_id']} {entry['predicted']:.4f} actual {entry['actual']:.4f}")


def build(results):
    page = Path(results) / "report.html"
    page.write_text(f"{len(records.load_records(results))} runs\n")
    return page


FAKES = {
    "scaling.fit": {"analyse": analyse, "forecast": forecast},
    "scaling.report.printed": {"show": show},
    "scaling.report.page": {"build": build},
    "scaling.data": {
        "prepare": lambda config, cache_dir, progress=None: cache_dir,
        "is_prepared": lambda config, cache_dir: False,
        "open": lambda config, cache_dir: types.SimpleNamespace(
            require_vocab=lambda vocab_size, extra_ids=0: None, require_horizon=lambda num_tokens: None
        ),
    },
}


def install(setitem=dict.__setitem__, setattr=setattr):
    """Puts the fakes in place; tests in one process pass pytest's own, which it undoes."""
    for name, contents in FAKES.items():
        fake = types.ModuleType(name)
        vars(fake).update(contents)
        parent, _, child = name.rpartition(".")
        setitem(sys.modules, name, fake)
        setattr(importlib.import_module(parent), child, fake)
    setattr(follow, "PROGRAM", (str(Path(__file__).resolve()),))


if __name__ == "__main__":
    # A test run that was started in the background hands SIGINT down as ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    install()
    sys.exit(sweep.main(loop="fake_loop"))
