"""Weights & Biases: one run per stage, the pipeline's stages in one group.

Offline by default: everything is written below the run's folder and `wandb sync` uploads it later. A resumed stage goes
on under the same run id, so its curves go on too.
"""

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moss_train.errors import ConfigError
from moss_train.redact import redact
from moss_train.report.config import TrackingConfig
from moss_train.report.metrics_file import MetricsRow

IDS_FILE = "wandb_runs.json"


class WandbSink:
    """Sends rows to Weights & Biases; raises ConfigError when the package is missing or refuses to start."""

    def __init__(self, config: TrackingConfig, run_directory: Path, run_name: str, settings: Mapping[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"tracking.wandb={config.wandb} needs the package wandb: install the extra (pip install "
                '"moss_train[wandb]") or set tracking.wandb=disabled'
            ) from error
        self._wandb = wandb
        self._config = config
        self._directory = run_directory
        self._run_name = run_name
        self._settings = redact(settings)
        self._run: Any = None

    def start(self, stage: str, total: int, step: int) -> None:
        wandb = self._wandb
        try:
            self._run = wandb.init(
                project=self._config.project,
                group=self._run_name,
                job_type=stage,
                name=f"{self._run_name}/{stage}",
                id=self._run_id(stage, step),
                resume="allow",
                mode=self._config.wandb,
                dir=str(self._directory),
                config={"stage": stage, "total_steps": total, **self._settings},
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"tracking.wandb={self._config.wandb}: Weights & Biases did not start ({error}); log in with "
                "`wandb login`, or set tracking.wandb=offline"
            ) from error
        # our own step axis: a resumed stage repeats steps, which wandb's own counter would refuse
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def _run_id(self, stage: str, step: int) -> str:
        """The stage's id, kept in the run's folder; a stage that starts anew gets a new one."""
        path = self._directory / IDS_FILE
        ids = json.loads(path.read_text()) if path.exists() else {}
        if step == 0 or stage not in ids:
            ids[stage] = secrets.token_hex(4)
            path.write_text(json.dumps(ids, indent=1) + "\n")
        return ids[stage]

    def write(self, row: MetricsRow) -> None:
        self._run.log({"step": row.step, **row.metrics})

    def event(self, stage: str, step: int, name: str, fields: Mapping[str, Any]) -> None:
        numbers = {f"{name}/{key}": value for key, value in fields.items() if isinstance(value, (int, float))}
        if numbers:
            self._run.log({"step": step, **numbers})

    def finish(self, completed: bool) -> None:
        self._run.finish(exit_code=0 if completed else 1)
        self._run = None
