"""Small rendered data, packed."""

import pytest
from small_runs import small_overrides

from moss_train.data.shards.pack import pack
from moss_train.data.synthetic.render import RenderOptions, render


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    """A folder with packed `train/<source>`, `heldout/realtime` and `heldout/sft`."""
    folder = tmp_path_factory.mktemp("rendered")
    render(RenderOptions(out=str(folder / "clips"), align=8, temporal=4, sft=6, realtime=12, heldout=5, workers=1))
    for source in ("train/align", "train/temporal", "train/sft", "train/realtime", "heldout/realtime", "heldout/sft"):
        pack(folder / "clips" / source, folder / "data" / source)
    return folder / "data"


@pytest.fixture
def small(packed):
    """See `small_overrides`."""
    return small_overrides(packed)
