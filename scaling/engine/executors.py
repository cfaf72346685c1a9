"""The executors, by the name that ``--executor`` gives them: a new one is a module and an entry here."""

from scaling.engine.run.executor import Executor
from scaling.engine.run.hosts import InProcess
from scaling.engine.run.workers import Processes
from scaling.engine.slurm.jobs import Jobs

EXECUTORS: dict[str, type[Executor]] = {"local": Processes, "inline": InProcess, "slurm": Jobs}
