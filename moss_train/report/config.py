"""Where the figures of a run are written."""

from dataclasses import dataclass

from moss_train.errors import ConfigError

WANDB_MODES = ("offline", "online", "disabled")


@dataclass
class TrackingConfig:
    """Sinks of metrics. Every sink gets the same rows; none of them decides anything."""

    wandb: str = "offline"
    """Weights & Biases: `offline` writes to the run's folder and needs no account or network, `online` also uploads,
    `disabled` writes nothing."""
    project: str = "moss_train"
    """Project in Weights & Biases."""
    console: bool = True
    """Print a line per logged step."""
    jsonl: bool = True
    """Append each row to `metrics.jsonl` in the run's folder; the HTML report's curves are drawn from it."""
    samples: bool = False
    """Write the samples of every step to `<stage>/samples.jsonl` in the run's folder: what a stage was trained on, to
    the very sample, over all interruptions."""

    def validate(self) -> None:
        if self.wandb not in WANDB_MODES:
            raise ConfigError(f"tracking.wandb={self.wandb!r}: legal values are {', '.join(WANDB_MODES)}")
        if self.wandb != "disabled" and not self.project:
            raise ConfigError("tracking.project is empty: name a project, or set tracking.wandb=disabled")
