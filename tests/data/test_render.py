"""`data render`: real files that show what their samples say, the same for any number of workers."""

import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from moss_train.data.synthetic.render import CAPTIONS_SUFFIX, RenderOptions, render, render_command, render_sample
from moss_train.data.synthetic.scenes import COLOURS, NATIVE_FPS, Scene
from moss_train.errors import ConfigError, DataError
from moss_train.streams.schema import parse_sample


def look_at(image_HWC: np.ndarray) -> Scene | None:
    """The scene by a simple rule: the median background is cut away, blocks are counted along the border they fill."""
    image = image_HWC.astype(np.int32)
    bright = image.max(-1) > 110
    if bright.sum() < 100:
        return None
    mean = np.median(image[bright], axis=0)
    colour = min(COLOURS, key=lambda name: float(np.abs(mean - COLOURS[name]).sum()))
    rows, columns = (bright.sum(axis) > 8 for axis in (1, 0))

    def runs(line: np.ndarray) -> int:
        return int(line[0]) + int((np.diff(line.astype(int)) == 1).sum())

    size = image.shape[0]
    y, x = (float(np.flatnonzero(line).mean()) / size - 0.5 for line in (rows, columns))
    if abs(x) > abs(y):
        place, count = ("left" if x < 0 else "right"), runs(rows)
    else:
        place, count = ("top" if y < 0 else "bottom"), runs(columns)
    return Scene(colour, place, ("one", "two", "three")[count - 1])


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("render") / "clips"
    render(RenderOptions(out=str(out), align=24, temporal=8, sft=30, realtime=24, heldout=20, seed=7, workers=1))
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_decoded_frame_shows_its_scene(rendered):
    seen = set()
    for path in sorted(rendered.rglob("*.mp4")):
        split, source, number = path.parts[-3], path.parts[-2], int(path.stem.rsplit("-", 1)[1])
        timeline = render_sample(7, split, source, number).timeline
        with av.open(path) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert not container.streams.audio
            frames = [
                (frame.time, frame.key_frame, frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)
            ]
        assert len(frames) == timeline.duration_s * NATIVE_FPS
        last_key_s = -1.0
        for index, (time_s, key_frame, picture) in enumerate(frames):
            assert time_s == pytest.approx(index / NATIVE_FPS)
            last_key_s = time_s if key_frame else last_key_s
            assert time_s - last_key_s < 1.0  # seeking costs at most a second
            assert look_at(picture) == timeline.scene_at(time_s)
        seen |= set(timeline.scenes())
        data = path.read_bytes()
        assert data.index(b"moov") < data.index(b"mdat")  # can be played from the start of a download
    assert len(seen) > 24


def test_stills_show_their_caption(rendered):
    stills = [*rendered.rglob("*.jpg"), *rendered.rglob("*.png")]
    assert {path.suffix for path in stills} == {".jpg", ".png"}
    for path in stills:
        sample = json.loads(path.with_suffix(".json").read_text())
        scene = look_at(np.asarray(Image.open(path).convert("RGB")))
        assert sample["text"] == ("nothing" if scene is None else scene.caption())


def test_staging_folders_are_whole(rendered):
    counts = {}
    for path in rendered.rglob("*.json"):
        if path.name == "render.json" or path.name.endswith(CAPTIONS_SUFFIX):
            continue
        sample = parse_sample(path.read_bytes(), path.stem)
        assert all((path.parent / f"{path.stem}.{medium.member}").is_file() for medium in sample.media)
        counts[path.parts[-3:-1]] = counts.get(path.parts[-3:-1], 0) + 1
    assert counts == {
        ("train", "align"): 24,
        ("train", "temporal"): 8,
        ("train", "sft"): 30,
        ("train", "realtime"): 24,
        ("heldout", "align"): 10,
        ("heldout", "temporal"): 10,
        ("heldout", "sft"): 10,
        ("heldout", "realtime"): 20,
    }


def test_bytes_depend_on_seed_and_key_alone(rendered, tmp_path):
    same = RenderOptions(
        out=str(tmp_path / "two"), align=40, temporal=3, sft=3, realtime=3, heldout=5, seed=7, workers=2
    )
    render(same)
    reference, again = files(rendered), files(tmp_path / "two")
    common = [name for name in again if name in reference and name != "render.json" and CAPTIONS_SUFFIX not in name]
    assert len(common) > 60 and all(reference[name] == again[name] for name in common)
    captions = [
        [json.loads(rendering[f"train/{source}{CAPTIONS_SUFFIX}"]) for source in ("temporal", "realtime")]
        for rendering in (reference, again)
    ]
    for more, fewer in zip(*captions, strict=True):
        assert len(fewer) == 3 and fewer.items() <= more.items() and list(fewer) == sorted(fewer)
    other = RenderOptions(
        out=str(tmp_path / "other"), align=2, temporal=0, sft=0, realtime=0, heldout=0, seed=8, workers=1
    )
    render(other)
    name = "train/align/align-train-000000.json"
    assert files(tmp_path / "other")[name] != reference[name] or (
        files(tmp_path / "other")["train/align/align-train-000001.json"]
        != reference["train/align/align-train-000001.json"]
    )
    assert not (tmp_path / "other" / "heldout").exists()


def test_a_filled_folder_is_replaced_only_on_demand(tmp_path, capsys):
    few = {"align": 1, "temporal": 0, "sft": 0, "realtime": 0, "heldout": 0, "workers": 1}
    out = tmp_path / "out"
    out.mkdir()
    assert render_command(RenderOptions(out=str(out), **few)) == 0  # an empty folder is taken
    assert "rendered 1 samples" in capsys.readouterr().out
    with pytest.raises(DataError, match="overwrite=true"):
        render(RenderOptions(out=str(out), **(few | {"seed": 1})))
    render(RenderOptions(out=str(out), overwrite=True, **(few | {"seed": 1})))
    assert json.loads((out / "render.json").read_text())["seed"] == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(DataError, match="did not write"):
        render(RenderOptions(out=str(tmp_path / "mine"), overwrite=True, **few))
    assert (tmp_path / "mine" / "thesis.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]  # nothing half-written


def test_what_the_same_code_and_options_made_is_left_alone(tmp_path, capsys, monkeypatch):
    few = {"align": 1, "temporal": 0, "sft": 0, "realtime": 0, "heldout": 0}
    out = tmp_path / "out"
    render(RenderOptions(out=str(out), workers=1, **few))
    still = next(out.rglob("align-train-*.json"))
    still.write_text("touched")
    assert render_command(RenderOptions(out=str(out), workers=2, overwrite=True, **few)) == 0
    assert "up to date" in capsys.readouterr().out and still.read_text() == "touched"
    # other code: this module's neighbours are read where it believes to stand
    monkeypatch.setattr("moss_train.data.synthetic.render.__file__", str(tmp_path / "render.py"))
    for name in ("world.py", "scenes.py", "render.py"):
        (tmp_path / name).write_text("# other code")
    with pytest.raises(DataError, match="other code"):
        render(RenderOptions(out=str(out), workers=1, **few))
    render(RenderOptions(out=str(out), workers=1, overwrite=True, **few))
    assert next(out.rglob("align-train-*.json")).read_text() != "touched"


def test_nothing_is_left_when_encoding_fails(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr("moss_train.data.synthetic.render.write_still", broken)
    with pytest.raises(OSError, match="disk full"):
        render(RenderOptions(out=str(tmp_path / "out"), align=2, temporal=0, sft=0, realtime=0, heldout=0, workers=1))
    assert not list(tmp_path.iterdir())


def test_options_are_checked(tmp_path):
    with pytest.raises(ConfigError, match="realtime=-1"):
        RenderOptions(out=str(tmp_path), realtime=-1).validate()
    with pytest.raises(ConfigError, match="nothing to render"):
        RenderOptions(out=str(tmp_path), align=0, temporal=0, sft=0, realtime=0, heldout=0).validate()
