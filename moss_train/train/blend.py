"""Mixtures given as shares of samples, such as the published ones in `data_specs/blends/`, as weights of sources."""

import math
from pathlib import Path

import yaml

from moss_train.data.shards.index import load_index
from moss_train.errors import ConfigError
from moss_train.locations import shipped_directory
from moss_train.train.config import StageConfig


def apply_blend(name: str, stage: StageConfig) -> None:
    """Set the weights of the stage's sources so that an epoch has the shares of `stage.blend`; nothing without one.

    The source that is scarcest for its share is read once an epoch, the others in part. `name` is the stage's, for
    errors. Raises ConfigError when the sources are not those of the blend.
    """
    if stage.blend is None:
        return
    shares = load_shares(name, stage.blend)
    sources = stage.data.sources
    if set(sources) != set(shares):
        raise ConfigError(
            f"stages.{name}.blend={stage.blend} mixes {', '.join(shares)}, but stages.{name}.data.sources holds "
            f"{', '.join(sources)}: name one source after each part, and take out the others with ~key"
        )
    sizes = {part: len(load_index(source.path).samples) for part, source in sources.items()}
    epoch = min(sizes[part] / share for part, share in shares.items())
    for part, share in shares.items():
        sources[part].weight = share * epoch / sizes[part]


def load_shares(name: str, blend: str) -> dict[str, float]:
    """Part → share, of the parts that occur; ConfigError when the file is missing or its shares do not sum to 1."""
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
        raise ConfigError(f"stages.{name}.blend={blend}: {path.name} holds no `shares: {{part: number}}`") from error
    if not math.isclose(sum(shares.values()), 1.0, abs_tol=0.01) or min(shares.values()) < 0:
        raise ConfigError(f"stages.{name}.blend={blend}: the shares must be at least 0 and sum to 1, not {shares}")
    return {part: share for part, share in shares.items() if share > 0}
