"""Mixtures given as shares of samples by modality, such as the published ones in `data_specs/blends/`."""

import math
from pathlib import Path

import yaml

from moss_train.data.config import MODALITIES
from moss_train.errors import ConfigError
from moss_train.locations import shipped_directory
from moss_train.train.config import StageConfig


def apply_blend(name: str, stage: StageConfig) -> None:
    """Set the stage's `data.shares` to those of `stage.blend`; nothing without one. `name` is the stage's, for errors.

    Raises ConfigError when shares are given both ways, or the file does not hold shares.
    """
    if stage.blend is None:
        return
    shares = load_shares(name, stage.blend)
    if stage.data.shares not in ({}, shares):
        raise ConfigError(f"stages.{name}: blend={stage.blend} and data.shares both say how to mix; leave one out")
    stage.data.shares = shares


def load_shares(name: str, blend: str) -> dict[str, float]:
    """Modality → share; ConfigError when the file is missing, or its shares are none of modalities or do not sum to
    1."""
    folder = shipped_directory("data_specs") / "blends"
    path = folder / f"{blend}.yaml"
    if not path.is_file():
        path = Path(blend)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise ConfigError(f"stages.{name}.blend={blend}: neither a file nor one of {known}")
    try:
        shares = {str(part): float(share) for part, share in yaml.safe_load(path.read_text())["shares"].items()}
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"stages.{name}.blend={blend}: {path.name} holds no `shares: {{modality: number}}`"
        ) from error
    unknown = sorted(set(shares) - set(MODALITIES))
    if unknown:
        raise ConfigError(
            f"stages.{name}.blend={blend}: {unknown[0]!r} is no modality; shares are of {', '.join(MODALITIES)}"
        )
    if not math.isclose(sum(shares.values()), 1.0, abs_tol=0.01) or min(shares.values()) < 0:
        raise ConfigError(f"stages.{name}.blend={blend}: the shares must be at least 0 and sum to 1, not {shares}")
    return shares
