"""Published mixtures become shares of modalities."""

import pytest

from moss_train.data.config import SourceConfig
from moss_train.data.sources import open_blend
from moss_train.errors import ConfigError
from moss_train.streams.config import TokenizerConfig
from moss_train.streams.tokenizer import load_tokenizer
from moss_train.train.blend import apply_blend, load_shares
from moss_train.train.config import StageConfig


def stage_of(packed, blend: str, **sources: str) -> StageConfig:
    stage = StageConfig(blend=blend)
    stage.data.sources = {part: SourceConfig(path=str(packed / "train" / path)) for part, path in sources.items()}
    return stage


def test_an_epoch_has_the_published_shares(packed):
    stage = stage_of(packed, "moss_temporal", image="align", video="realtime")
    apply_blend("temporal", stage)
    apply_blend("temporal", stage)  # planning a resumed run does so again
    assert stage.data.shares == {"text": 0.0, "image": 0.26, "video": 0.74}
    opened = open_blend(stage.data, stage.compiler, load_tokenizer(TokenizerConfig()), 28, seed=0)
    epoch = opened.blend.epoch_order(0)
    video = sum(opened.blend.sources[source].modalities[unit] == 2 for source, unit in epoch.tolist())
    assert len(epoch) > 10 and abs(video - 0.74 * len(epoch)) <= 1.5


@pytest.mark.parametrize("name", ["align", "temporal", "sft", "realtime"])
def test_shipped_blends_are_whole(name):
    assert sum(load_shares(name, f"moss_{name}").values()) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("shares: {text: 0.5}", "sum to 1"),
        ("shares: {a: 1.0}", "no modality"),
        ("shares: 3", "holds no"),
        ("[", "holds no"),
    ],
)
def test_bad_files(tmp_path, text, expected):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        load_shares("sft", str(path))


def test_shares_are_given_in_one_place(packed):
    stage = stage_of(packed, "moss_temporal", video="realtime")
    stage.data.shares = {"video": 1.0}
    with pytest.raises(ConfigError, match="both say how to mix"):
        apply_blend("temporal", stage)
    with pytest.raises(ConfigError, match="moss_align, moss_realtime"):
        load_shares("sft", "mos_sft")
