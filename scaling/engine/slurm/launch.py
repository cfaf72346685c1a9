"""Launch files: what to type, or to submit, so that every host of a slice or a cluster gives the same command.

All three start ``python -m scaling.sweep … --executor inline --distributed auto`` once a process and leave it to JAX to
find the others. A preempted job is given the same command again, by its queue or by hand, and goes on from the newest
checkpoint: so results and work folder must outlive the machine.
"""

import argparse
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

TARGETS = ("tpu", "gke", "slurm")
DEFAULT_TOPOLOGY = "v5e:8x8"
GPUS_PER_NODE = 8
CHIPS_PER_HOST = 4  # of the multi-host machine types named below
# Coordinator and TPU runtime of JAX's processes on a slice.
_PORTS = (8471, 8080)
# Options of the sweep that its command in a launch file has not, and why. All others that were given it has.
WRITTEN_ANEW = ("grid", "executor", "distributed", "results", "workdir")
NOT_CARRIED = {
    "help": "it is no run",
    "print_launch": "it is what prints the file",
    "topology": "it names the slice that the file asks for",
    "suggest": "it compiles and trains nothing",
    "plan": "it trains nothing",
    "status": "it trains nothing",
    "json": "a plan is written where it is asked for",
}
REFUSED = {
    "shard": "all hosts of a slice train one share: leave it out",
    "slurm": "it is of --executor slurm: write what the job needs into the file",
    "detach": "it is of --executor slurm: leave it out",
}


@dataclass(frozen=True)
class Generation:
    """How Google Cloud names a TPU generation (its documentation, pages TPU v5e, v5p, v6e and TPUs in GKE)."""

    accelerator_type: str  # with {n}: chips, or TensorCores where a chip counts as two
    cores_per_chip: int
    runtime: str  # of a TPU VM
    gke_accelerator: str
    gke_machine: str


GENERATIONS = {
    "v5e": Generation("v5litepod-{n}", 1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", "ct5lp-hightpu-4t"),
    "v5p": Generation("v5p-{n}", 2, "v2-alpha-tpuv5", "tpu-v5p-slice", "ct5p-hightpu-4t"),
    "v6e": Generation("v6e-{n}", 1, "v2-alpha-tpuv6e", "tpu-v6e-slice", "ct6e-standard-4t"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--print-launch", choices=TARGETS, metavar="TARGET",
        help=f"print what starts this sweep on a TPU slice (tpu), as a JobSet on GKE (gke) or with sbatch on GPUs "
        f"(slurm), and stop; --topology names the slice (default {DEFAULT_TOPOLOGY}), --devices the GPUs "
        f"(default {GPUS_PER_NODE})")  # fmt: skip


def text_of(target: str, parser: argparse.ArgumentParser, words: Sequence[str], name: str) -> str:
    """Writes the launch file of ``target`` for a command's ``words``, which ``parser`` can read, and a grid called
    ``name``. Raises ValueError for options that cannot be in it."""
    args = parser.parse_args(words)
    for option in parser._actions:
        if option.dest in REFUSED and getattr(args, option.dest) != option.default:
            raise ValueError(f"{option.option_strings[-1]} with --print-launch: {REFUSED[option.dest]}")
    carried = carried_options(parser, args)
    if target == "slurm":
        return _slurm(args, carried, name)
    generation, shape = _slice(args.topology or DEFAULT_TOPOLOGY)
    return (_tpu if target == "tpu" else _gke)(args, carried, name, generation, shape)


def carried_options(parser: argparse.ArgumentParser, args) -> list[str]:
    """Returns the words of every option that was given and that the started command is to have: all that ``parser``
    knows but those named above."""
    left_out = {*WRITTEN_ANEW, *NOT_CARRIED, *REFUSED}
    words = []
    for option in parser._actions:
        value = getattr(args, option.dest, option.default)
        if option.dest in left_out or value == option.default:
            continue
        flag = option.option_strings[-1]
        if option.nargs == 0:
            words.append(flag)
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        else:  # one word where a value of its own would be taken for an option
            words += [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]
    return words


def _slice(topology: str) -> tuple[Generation, str]:
    generation, _, shape = topology.partition(":")
    sizes = shape.split("x")
    if generation not in GENERATIONS or not all(size.isdecimal() and int(size) for size in sizes):
        raise ValueError(
            f"--topology {topology}: write a slice of {', '.join(GENERATIONS)} and its shape, as v5e:8x8 or v5p:4x4x4"
        )
    return GENERATIONS[generation], shape


def _chips(shape: str) -> int:
    return math.prod(int(size) for size in shape.split("x"))


def _command(args, carried: Sequence[str], results: str, workdir: str) -> str:
    """The command as bash reads it. ``results`` and ``workdir``, where none were given, are bash's own words."""
    words = ["python", "-m", "scaling.sweep", "--grid", args.grid, "--executor", "inline", "--distributed", "auto"]
    results = shlex.quote(str(args.results)) if args.results else results
    workdir = shlex.quote(str(args.workdir)) if args.workdir else workdir
    return f"{shlex.join([*words, *carried])} --results {results} --workdir {workdir}"


def _tpu(args, carried: Sequence[str], name: str, generation: Generation, shape: str) -> str:
    accelerator = generation.accelerator_type.format(n=_chips(shape) * generation.cores_per_chip)
    slug = _slug(name)
    # A file system that all hosts mount: records and checkpoints of a preempted slice are there for the next.
    quoted = shlex.quote(name)
    command = _command(args, carried, f'"$SHARED"/results/{quoted}', f'"$SHARED"/work/{quoted}')
    # Two shells read it: this one puts SHARED in, that of the hosts gets the rest as it was given.
    run = f'cd scaling && export SCALING_CACHE="$SHARED"/data && . .venv/bin/activate &&\n    {command}'
    run = '"export SHARED=$SHARED; "' + shlex.quote(run)
    return f"""\
# A TPU slice of {_chips(shape)} chips. Fill in the first four lines; the rest is to be copied as it is.
export PROJECT=my-project ZONE=us-west4-a
export REPOSITORY=https://github.com/me/scaling.git
export SHARED=/mnt/shared          # an NFS (Filestore) that every host mounts
export NFS=10.0.0.2:/share

gcloud compute tpus tpu-vm create {slug} --project="$PROJECT" --zone="$ZONE" \\
    --accelerator-type={accelerator} --version={generation.runtime} --spot

gcloud compute tpus tpu-vm ssh {slug} --project="$PROJECT" --zone="$ZONE" --worker=all --command="
    sudo apt-get install -y -qq nfs-common &&
    sudo mkdir -p $SHARED && (mountpoint -q $SHARED || sudo mount $NFS $SHARED) &&
    (test -d scaling || git clone --quiet $REPOSITORY scaling) && cd scaling &&
    python3 -m venv .venv && .venv/bin/pip install --quiet '.[tpu]'"

# The run. After a preemption: create the slice again, install, and give this command again; it goes on.
gcloud compute tpus tpu-vm ssh {slug} --project="$PROJECT" --zone="$ZONE" --worker=all --command={run}

gcloud compute tpus tpu-vm delete {slug} --project="$PROJECT" --zone="$ZONE" --quiet
"""


def _gke(args, carried: Sequence[str], name: str, generation: Generation, shape: str) -> str:
    import yaml

    hosts = max(1, _chips(shape) // CHIPS_PER_HOST)
    command = _command(args, carried, shlex.quote(f"/shared/results/{name}"), shlex.quote(f"/shared/work/{name}"))
    container = {
        "name": "sweep",
        "image": "IMAGE",
        "command": ["bash", "-c", command],
        "env": [{"name": "SCALING_CACHE", "value": "/shared/data"}],
        "ports": [{"containerPort": port} for port in _PORTS],
        "resources": {"limits": {"google.com/tpu": min(CHIPS_PER_HOST, _chips(shape))}},
        "volumeMounts": [{"name": "shared", "mountPath": "/shared"}],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 90,  # a checkpoint is saved meanwhile
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": generation.gke_accelerator,
            "cloud.google.com/gke-tpu-topology": shape,
        },
        "containers": [container],
        "volumes": [{"name": "shared", "persistentVolumeClaim": {"claimName": "CLAIM"}}],
    }
    # A pod that fails takes its job with it, and the job the set, which starts anew on all hosts: the command goes on.
    job = {"parallelism": hosts, "completions": hosts, "completionMode": "Indexed", "backoffLimit": 0}
    manifest = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": _slug(name),
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {"maxRestarts": 100},
            "replicatedJobs": [
                {"name": "slice", "replicas": 1, "template": {"spec": {**job, "template": {"spec": pod}}}}
            ],
        },
    }
    return f"""\
# kubectl apply -f this file, on a cluster with JobSet and a node pool of {hosts} × {generation.gke_machine}, topology
# {shape}. Put in: IMAGE, one with this package and its extra tpu; CLAIM, a ReadWriteMany volume claim (Filestore).
{yaml.safe_dump(manifest, sort_keys=False, width=1000)}"""


def _slurm(args, carried: Sequence[str], name: str) -> str:
    gpus = args.devices or GPUS_PER_NODE
    per_node = min(gpus, GPUS_PER_NODE)
    if gpus % per_node:
        raise ValueError(f"--devices {gpus}: write a multiple of {GPUS_PER_NODE}, whole nodes of that many GPUs")
    command = _command(args, carried, shlex.quote(f"results/{name}"), shlex.quote(f".scaling/{name}"))
    # One process a GPU: that is how JAX reads Slurm's environment.
    return f"""\
#!/bin/bash
# sbatch this file, in the checkout, on a file system that all nodes share. Name the partition and account it needs.
#SBATCH --job-name={_slug(name)}
#SBATCH --nodes={gpus // per_node}
#SBATCH --ntasks-per-node={per_node}
#SBATCH --gpus-per-node={per_node}
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@90
#SBATCH --open-mode=append
#SBATCH --output={_slug(name)}-%j.log

# Preempted or out of time, the job is requeued and goes on from its newest checkpoint.
srun --kill-on-bad-exit=1 .venv/bin/{command}
code=$?
[ $code -eq 130 ] && scontrol requeue "$SLURM_JOB_ID"
exit $code
"""


def _slug(name: str) -> str:
    """``name`` as Google Cloud, Kubernetes and Slurm take it: lower case, digits, hyphens, a letter first."""
    slug = "".join(c if c.isascii() and c.isalnum() else "-" for c in name.lower()).strip("-")[:40]
    return slug if slug[:1].isalpha() else f"sweep-{slug}"
