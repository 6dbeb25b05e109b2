"""Published mixtures become weights of sources."""

import pytest

from moss_train.data.config import SourceConfig
from moss_train.errors import ConfigError
from moss_train.train.blend import apply_blend, load_shares
from moss_train.train.config import StageConfig


def stage_of(packed, blend: str, **sources: str) -> StageConfig:
    stage = StageConfig(blend=blend)
    stage.data.sources = {part: SourceConfig(path=str(packed / "train" / path)) for part, path in sources.items()}
    return stage


def test_an_epoch_has_the_published_shares(packed):
    stage = stage_of(packed, "moss_temporal", image="align", video="realtime")
    apply_blend("temporal", stage)
    weights = {part: source.weight for part, source in stage.data.sources.items()}
    sizes = {"image": 8, "video": 12}  # see conftest
    image, video = (weights[part] * sizes[part] for part in ("image", "video"))
    assert image / (image + video) == pytest.approx(0.26)
    assert max(weights.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["align", "temporal", "sft", "realtime"])
def test_shipped_blends_are_whole(name):
    assert sum(load_shares(name, f"moss_{name}").values()) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    ("text", "expected"), [("shares: {a: 0.5}", "sum to 1"), ("shares: 3", "holds no"), ("[", "holds no")]
)
def test_bad_files(tmp_path, text, expected):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        load_shares("sft", str(path))


def test_sources_must_be_the_parts(packed):
    with pytest.raises(ConfigError, match="mixes image, video, but .* holds video"):
        apply_blend("temporal", stage_of(packed, "moss_temporal", video="realtime"))
    with pytest.raises(ConfigError, match="moss_align, moss_realtime"):
        load_shares("sft", "mos_sft")
