"""Step logs for people to watch, beside the record that analysis reads: TensorBoard files, Weights & Biases."""

from pathlib import Path

from scaling.config import RunConfig
from scaling.execution import ExecutionConfig
from scaling.fields import to_dict


class StepLogs:
    """Scalars of one run, to the places ``execution`` names; nowhere by default.

    TensorBoard files go to ``folder``/<run_id>; W&B takes the run_id as its own, so a resumed run goes on in the same
    place. Raises ValueError, naming the extra to install, when a package is missing.
    """

    def __init__(self, execution: ExecutionConfig, run: RunConfig, folder: Path, sweep_name: str):
        self._tensorboard = self._wandb = None
        if execution.tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise ValueError(_missing("tensorboard")) from None
            self._tensorboard = SummaryWriter(logdir=str(Path(folder) / run.run_id))
        if execution.wandb:
            try:
                import wandb
            except ImportError:
                raise ValueError(_missing("wandb")) from None
            self._wandb = wandb.init(
                project=sweep_name, id=run.run_id, config=to_dict(run), resume="allow", reinit="create_new"
            )

    def write(self, step: int, scalars: dict[str, float | None]) -> None:
        """``scalars`` as of ``step``; None is left out."""
        present = {name: value for name, value in scalars.items() if value is not None}
        if self._tensorboard is not None:
            for name, value in present.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(present, step=step)

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _missing(extra: str) -> str:
    return f'execution.{extra} is true but the package is not installed: write false, or pip install "scaling[{extra}]"'
