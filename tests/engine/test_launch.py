"""Launch files against what would read them: bash, sbatch, and the fields of the JobSet API."""

import re
import subprocess

import pytest
import yaml

from scaling import sweep
from scaling.engine import options as sweep_options
from scaling.engine.slurm import launch
from tests.engine import slurm_cluster

GRID = "recipe: default@1\nbase: {model: {width: 8}, horizon: {tokens: 3000}}\naxes: {seed: [0, 1]}\n"

# Fields and types of jobset.x-k8s.io/v1alpha2 and, from its template on, of batch/v1 Job and core/v1 Pod, as far as a
# manifest of ours has use for them; a mapping stands for an object with no other fields, a list for a list of such.
NAMES = {str: str}
JOBSET = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "annotations": NAMES},
    "spec": {
        "failurePolicy": {"maxRestarts": int, "restartStrategy": str},
        "replicatedJobs": [{
            "name": str,
            "replicas": int,
            "template": {"metadata": {"annotations": NAMES}, "spec": {
                "parallelism": int, "completions": int, "completionMode": str, "backoffLimit": int,
                "template": {"spec": {
                    "restartPolicy": str, "terminationGracePeriodSeconds": int, "nodeSelector": NAMES,
                    "containers": [{
                        "name": str, "image": str, "command": [str], "env": [{"name": str, "value": str}],
                        "ports": [{"containerPort": int}], "resources": {"limits": {str: int}},
                        "volumeMounts": [{"name": str, "mountPath": str}],
                    }],
                    "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str}}],
                }},
            }},
        }],
    },
}  # fmt: skip


def check(value, schema, path="manifest"):
    if isinstance(schema, type):
        assert type(value) is schema, f"{path} is {value!r}"
    elif isinstance(schema, list):
        assert isinstance(value, list), path
        for i, item in enumerate(value):
            check(item, schema[0], f"{path}[{i}]")
    elif str in schema:
        assert all(isinstance(k, str) and isinstance(v, schema[str]) for k, v in value.items()), path
    else:
        assert set(value) <= set(schema), f"{path} has {set(value) - set(schema)}"
        for key, item in value.items():
            check(item, schema[key], f"{path}.{key}")


def check_by_kubernetes(models, value, kind, path):
    """``value`` as a ``kind`` of Kubernetes' own API, as its client generated it: names, types, what is required."""
    if match := re.fullmatch(r"(list|dict)[\[(](?:str, )?(\w+)[\])]", kind, re.IGNORECASE):
        of = match[1].lower()
        assert isinstance(value, {"list": list, "dict": dict}[of]), path
        for key, item in value.items() if of == "dict" else enumerate(value):
            check_by_kubernetes(models, item, match[2], f"{path}.{key}")
        return
    if kind in ("str", "int", "bool"):
        assert type(value).__name__ == kind, f"{path} is {value!r}, not {kind}"
        return
    model = getattr(models, kind)
    names = {theirs: ours for ours, theirs in model.attribute_map.items()}
    assert set(value) <= set(names), f"{path}: {kind} has no {set(value) - set(names)}"
    model(**{names[key]: item for key, item in value.items()})  # raises ValueError without what is required
    for key, item in value.items():
        check_by_kubernetes(models, item, model.openapi_types[names[key]], f"{path}.{key}")


def printed(capsys, *options: str) -> str:
    assert sweep.main(["--grid", "sweeps/smoke.yaml", "--print-launch", *options]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "topology, accelerator, machine, hosts",
    [
        ("v5e:8x8", "tpu-v5-lite-podslice", "ct5lp-hightpu-4t", 16),
        ("v5p:4x4x4", "tpu-v5p-slice", "ct5p-hightpu-4t", 16),
        ("v6e:16x16", "tpu-v6e-slice", "ct6e-standard-4t", 64),
    ],
)
def test_the_manifest_is_a_jobset(capsys, topology, accelerator, machine, hosts):
    text = printed(capsys, "gke", "--topology", topology)
    manifest = yaml.safe_load(text)
    check(manifest, JOBSET)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = manifest["spec"]["replicatedJobs"]
    job = job["template"]["spec"]
    assert job["parallelism"] == job["completions"] == hosts
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == accelerator
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology.partition(":")[2]
    assert f"{hosts} × {machine}" in text
    container = pod["containers"][0]
    assert container["resources"]["limits"]["google.com/tpu"] == 4
    assert container["command"][2].startswith("python -m scaling.sweep --grid sweeps/smoke.yaml --executor inline")


def test_kubernetes_knows_every_field_of_the_job(capsys):
    """JobSet's own fields are in ``JOBSET`` alone: its schema comes in no package."""
    models = pytest.importorskip("kubernetes.client", reason="kubernetes is not installed (extra test)")
    manifest = yaml.safe_load(printed(capsys, "gke"))
    check_by_kubernetes(models, manifest["metadata"], "V1ObjectMeta", "metadata")
    (job,) = manifest["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    resources = pod["containers"][0]["resources"]  # quantities: the API takes numbers too, the client does not
    resources["limits"] = {name: str(quantity) for name, quantity in resources["limits"].items()}
    check_by_kubernetes(models, job["template"], "V1JobTemplateSpec", "template")
    for broken, says in (
        ({"restart_policy": "Never"}, "V1PodSpec has no {'restart_policy'}"),
        ({"containers": None}, "containers"),
        ({"terminationGracePeriodSeconds": "90s"}, "90s"),
        ({"volumes": [{"persistentVolumeClaim": {"claimName": "c"}}]}, "name"),
    ):
        with pytest.raises((AssertionError, ValueError), match=says):
            check_by_kubernetes(models, {**pod, **broken}, "V1PodSpec", "pod")


@pytest.mark.parametrize(
    "topology, accelerator", [("v5e:8x8", "v5litepod-64"), ("v5p:4x4x4", "v5p-128"), ("v6e:16x16", "v6e-256")]
)
def test_a_slice_is_named_as_google_names_it(capsys, topology, accelerator):
    text = printed(capsys, "tpu", "--topology", topology)
    assert f"--accelerator-type={accelerator} " in text
    assert text.count("--worker=all") == 2


@pytest.mark.parametrize("target", ["tpu", "slurm"])
def test_bash_can_read_it(capsys, target):
    text = printed(capsys, target)
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_the_sweep_was_told_is_passed_on(capsys):
    text = printed(capsys, "slurm", "--devices", "16", "--pack", "2", "--results", "out/x", "--workdir", "/scratch/x")
    assert "#SBATCH --nodes=2\n" in text
    assert "#SBATCH --ntasks-per-node=8\n" in text  # a process each GPU, as JAX reads Slurm
    assert "--distributed auto --pack 2 --devices 16 --results out/x --workdir /scratch/x" in text


def words_of(target: str, text: str, tmp_path) -> list[str]:
    """The words that the sweep is started with, by real shells: ``python`` and what surrounds it stand in for."""
    stand_in = tmp_path / "bin"
    stand_in.mkdir(exist_ok=True)
    for name in ("python", "srun", "gcloud"):
        (stand_in / name).write_text(SAYS[name])
        (stand_in / name).chmod(0o755)
    if target == "gke":
        script = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        script = script["containers"][0]["command"][2]
    else:
        script = text.replace("srun --kill-on-bad-exit=1 .venv/bin/", "srun ")
    (tmp_path / "scaling" / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
    (tmp_path / "scaling" / ".venv" / "bin" / "activate").write_text("")
    environment = {"PATH": f"{stand_in}:/usr/bin:/bin", "SLURM_JOB_ID": "1", "SAID": str(tmp_path / "said")}
    subprocess.run(["bash", "-c", script], env=environment, cwd=tmp_path, check=True, capture_output=True)
    return (tmp_path / "said").read_text().split("\0")[:-1]


SAYS = {
    "python": """#!/bin/bash
printf '%s\\0' "$@" > "$SAID"
""",
    "srun": """#!/bin/bash
exec "$@"
""",
    "gcloud": """#!/bin/bash
for word in "$@"; do
    case "$word" in --command=*python\\ -m*) exec bash -c "${word#--command=}" ;; esac
done
""",
}


@pytest.mark.parametrize("target", launch.TARGETS)
def test_every_word_arrives_as_it_was_written(tmp_path, monkeypatch, capsys, target):
    grid = tmp_path / "it's a $grid: `x` #1.yaml"
    grid.write_text(GRID)
    results, workdir = 'out of "x" & it\'s; $HOME', "work `id` \\ 'x'"
    monkeypatch.chdir(tmp_path)
    given = ["--results", results, "--workdir", workdir, "--budget-hours", "7", "--drop", "--strict", "--workers", "3"]
    assert sweep.main(["--grid", str(grid), "--print-launch", target, *given]) == 0
    words = words_of(target, capsys.readouterr().out, tmp_path)
    assert words[:2] == ["-m", "scaling.sweep"]
    args = sweep_options.parser().parse_args(words[2:])
    assert args.grid == str(grid)
    assert (str(args.results), str(args.workdir)) == (results, workdir)
    assert (args.budget_hours, args.drop, args.strict, args.workers) == (7.0, True, True, 3)
    assert (args.executor, args.distributed) == ("inline", "auto")
    # Folders by the grid's name, where none are given.
    assert sweep.main(["--grid", str(grid), "--print-launch", target]) == 0
    args = sweep_options.parser().parse_args(words_of(target, capsys.readouterr().out, tmp_path)[2:])
    shared = {"tpu": "/mnt/shared/results", "gke": "/shared/results", "slurm": "results"}[target]
    assert str(args.results) == f"{shared}/{grid.stem}"


VALUES = {"only": ["--only", "ab", "cd"], "pack": ["--pack", "2"], "workers": ["--workers", "2"],
          "disk_budget": ["--disk-budget", "3"], "hardware": ["--hardware", "h100"], "drop": ["--drop"],
          "strict": ["--strict"], "devices": ["--devices", "8"], "mfu": ["--mfu", "0.5"],
          "progress": ["--progress", "plain"], "remove_orphans": ["--remove-orphans"],
          "train_unkept": ["--train-unkept"]}  # fmt: skip


def test_each_option_is_carried_or_is_said_not_to_be():
    parser = sweep_options.parser()
    known = [option.dest for option in parser._actions]
    apart = {*launch.WRITTEN_ANEW, *launch.NOT_CARRIED, *launch.REFUSED}
    assert apart <= set(known)
    for dest in set(known) - apart:
        flag = f"--{dest.replace('_', '-')}"
        given = VALUES.get(dest, [flag, "2"])
        args = parser.parse_args(["--grid", "g.yaml", *given])
        words = launch.carried_options(parser, args)
        assert vars(parser.parse_args(["--grid", "g.yaml", *words])) == vars(args)
        assert words[0] == flag
    for given in (["--shard", "1/2"], ["--slurm", "time=3"], ["--detach"]):
        with pytest.raises(ValueError, match=f"{given[0]} with --print-launch"):
            launch.text_of("slurm", parser, ["--grid", "g.yaml", *given], "g")


def test_what_cannot_be_is_refused(capsys):
    for options, says in (
        (["gke", "--topology", "v9:2x2"], "write a slice of v5e, v5p, v6e and its shape"),
        (["slurm", "--devices", "12"], "--devices 12: write a multiple of 8"),
    ):
        assert sweep.main(["--grid", "sweeps/smoke.yaml", "--print-launch", *options]) == 2
        assert says in capsys.readouterr().err


def test_names_become_names():
    assert launch._slug("Pretrain_7b") == "pretrain-7b"
    assert launch._slug("7b") == "sweep-7b"


@pytest.mark.slow
def test_slurm_would_take_it(tmp_path, capsys):
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    text = printed(capsys, "slurm", "--devices", "1").replace("#SBATCH --gpus-per-node=1\n", "")  # this node has none
    text = text.replace("--cpus-per-task=8", "--cpus-per-task=1")
    script = tmp_path / "sweep.sbatch"
    script.write_text(text)
    with slurm_cluster.cluster(tmp_path / "cluster") as environment:
        done = subprocess.run(
            ["sbatch", "--test-only", script], env=environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stderr
