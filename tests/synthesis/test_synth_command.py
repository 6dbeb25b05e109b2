"""`data synth` as a user runs it: sources, the same folder for any number of workers, what is refused and how."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from caption_cases import files

from moss_train.cli import main
from moss_train.data.shards.pack import pack
from moss_train.data.synthetic.render import RenderOptions, render, render_sample
from moss_train.errors import ConfigError, DataError
from moss_train.streams.schema import parse_sample
from moss_train.synthesis.command import SynthOptions, synth
from moss_train.synthesis.pipeline import WriterFault

sys.path.insert(0, str(Path(__file__).parents[1]))
from shared_data import shared_folder  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "data_specs" / "examples"


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("synth") / "clips"
    render(RenderOptions(out=str(out), align=0, temporal=3, sft=0, realtime=40, heldout=0, seed=5, workers=1))
    return out


def rendered(clips: Path, out: Path, **changed) -> SynthOptions:
    options = {"path": str(clips / "train" / "realtime"), "out": str(out), "tokens_per_second": 8.0, "workers": 1}
    return SynthOptions(source="rendered", **(options | changed))


def test_the_renderer_writes_what_its_clips_show(clips):
    assert sorted(path.name for path in (clips / "train").iterdir()) == [
        "realtime", "realtime.captions.json", "temporal", "temporal.captions.json",
    ]  # fmt: skip
    for source in ("realtime", "temporal"):
        captions = json.loads((clips / "train" / f"{source}.captions.json").read_text())
        assert sorted(captions) == [path.stem for path in sorted((clips / "train" / source).glob("*.mp4"))]
        for key, entry in captions.items():
            shown = render_sample(5, "train", source, int(key.rsplit("-", 1)[1])).timeline
            assert entry["duration"] == shown.duration_s
            for tenth in range(int(10 * shown.duration_s)):
                told = [
                    text
                    for (start, end), text in zip(entry["timestamps"], entry["sentences"], strict=True)
                    if start <= tenth / 10 < end
                ]
                scene = shown.scene_at(tenth / 10)
                assert told == ([] if scene is None else [scene.caption()])


def test_streams_of_rendered_clips_can_be_packed_and_are_the_same_for_any_workers(clips, tmp_path, capsys):
    made = synth(rendered(clips, tmp_path / "one"))
    assert made["videos"] == made["samples"] == 40 and not made["rejected_videos"]
    assert main(
        ["data", "synth", "source=rendered", f"path={clips}/train/realtime", f"out={tmp_path}/two", "workers=2",
         "tokens_per_second=8", "copy=false"]
    ) == 0  # fmt: skip
    assert "40 streams of 40 videos" in capsys.readouterr().out
    assert files(tmp_path / "one") == files(tmp_path / "two")
    for path in (tmp_path / "one").glob("*.json"):
        sample = parse_sample(path.read_bytes(), path.stem)
        clip = clips / "train" / "realtime" / f"{path.stem}.mp4"
        assert sample.media[0].duration_s == 12.0 and path.with_suffix(".mp4").read_bytes() == clip.read_bytes()
        assert (tmp_path / "two" / clip.name).stat().st_ino == clip.stat().st_ino  # linked
    # the same again changes nothing, other options are refused unless told otherwise
    before = (tmp_path / "one" / "synth.jsonl").stat().st_mtime_ns
    assert synth(rendered(clips, tmp_path / "one", workers=2)) is None
    assert main(["data", "synth", "source=rendered", f"path={clips}/train/realtime", f"out={tmp_path}/one",
                 "tokens_per_second=8"]) == 0  # fmt: skip
    assert "up to date" in capsys.readouterr().out
    assert (tmp_path / "one" / "synth.jsonl").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="overwrite=true"):
        synth(rendered(clips, tmp_path / "one", seed=1))
    other = synth(rendered(clips, tmp_path / "one", seed=1, overwrite=True, limit=30))
    assert other["samples"] == 30 and len(list((tmp_path / "one").glob("*.mp4"))) == 30
    # what `data pack` makes of it is a source of captions again
    packed = pack(str(tmp_path / "two"), tmp_path / "packed")
    assert packed.samples == 40 and not packed.rejected
    again = synth(SynthOptions(source="samples", path=str(tmp_path / "packed"), out=str(tmp_path / "again"), workers=1))
    silent = sum(not json.loads(path.read_text())["events"] for path in (tmp_path / "two").glob("*.json"))
    assert again["reasons"]["video: unreadable"] == silent and again["samples"] + again["rejected_videos"] == 40


def test_a_seed_and_a_key_alone_make_a_sample(clips, tmp_path):
    synth(rendered(clips, tmp_path / "all"))
    captions = json.loads((clips / "train" / "realtime.captions.json").read_text())
    some = dict(list(captions.items())[7:11])
    (tmp_path / "some.json").write_text(json.dumps(some))
    synth(rendered(clips, tmp_path / "some", captions=str(tmp_path / "some.json")))
    for key in some:
        assert (tmp_path / "some" / f"{key}.json").read_text() == (tmp_path / "all" / f"{key}.json").read_text()


def test_annotations_of_activitynet(videos, tmp_path):
    options = SynthOptions(
        source="activitynet", captions=str(videos / "captions.json"), media_root=str(videos / "media"),
        out=str(tmp_path / "out"), workers=1,
    )  # fmt: skip
    made = synth(options)
    assert made["samples"] == 6 and made["questions"] == made["answers"]
    assert made["videos"] == made["samples"] + made["rejected_videos"]


@pytest.mark.parametrize("source", ["activitynet", "coin", "ego4d", "text_stream", "streamo"])
def test_the_examples_of_public_formats(source, tmp_path):
    media = tmp_path / "media"
    media.mkdir()
    for name in ("v_QOlSCBRmfWY v_bXdq2zI1Ms0 v_uqiMw7tQ1Cc WLVQMQbMBhc 9rTZxkQ3mKw street kitchen match "
                 "0a8f2c1e-77aa-4c0f-9d55-1f6f9d1b2c33 b7d1e6f0-1c22-4f3e-8a10-6b2f5d3a9e01 3").split():  # fmt: skip
        (media / f"{name}.mp4").write_bytes(b"video")
    made = synth(
        SynthOptions(
            source=source, captions=str(EXAMPLES / source), media_root=str(media), out=str(tmp_path / "out"), workers=1
        )
    )
    assert made["samples"] >= 1 and made["questions"] >= 1
    assert made["reasons"].get("video: unreadable", 0) == 1  # each holds a row that must be refused
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert len(rejected) == sum(made["reasons"].values())


def test_real_annotations(tmp_path):
    """The reference's published rows: their commentary, spoken over slots, as captions."""
    annotations = shared_folder() / "real_data" / "annotations" / "mllm_realtime_sft_demo.json"
    media = tmp_path / "media"
    media.mkdir()
    for row in json.loads(annotations.read_text()):
        path = json.loads(row["videos"][0].partition("[INFO]")[2])["video_path"]
        (media / Path(path).name).write_bytes(b"not published")
    made = synth(
        SynthOptions(
            source="moss", captions=str(annotations), media_root=str(media), out=str(tmp_path / "out"), workers=1,
            seed=1, question_every_s=15.0,
        )
    )  # fmt: skip
    assert made["samples"] == 3 and made["questions"] >= 3


def test_an_interrupted_run_keeps_its_samples(clips, tmp_path, monkeypatch):
    from moss_train.synthesis import command

    whole = command._write_some

    def stops(some, *rest):
        if some[0].timeline.key.endswith("000032"):
            raise KeyboardInterrupt
        return whole(some, *rest)

    monkeypatch.setattr(command, "_write_some", stops)
    with pytest.raises(KeyboardInterrupt):
        synth(rendered(clips, tmp_path / "out"))
    unfinished = tmp_path / "out.unfinished"
    before = {path.name: path.stat().st_mtime_ns for path in unfinished.glob("*.json")}
    assert len(before) == 32 and not (tmp_path / "out").exists()
    monkeypatch.undo()
    made = synth(rendered(clips, tmp_path / "out"))
    assert made["samples"] == 40 and not unfinished.exists()
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in before} == before


def test_what_other_options_left_unfinished_is_not_taken_over(clips, tmp_path):
    unfinished = tmp_path / "out.unfinished"
    unfinished.mkdir()
    (unfinished / ".made_by").write_text("something else")
    (unfinished / "outcomes.jsonl").write_text('{"key": "realtime-train-000000", "written": false}\n')
    assert synth(rendered(clips, tmp_path / "out"))["samples"] == 40


def test_a_writer_that_fails_for_one_video_costs_that_video(clips, tmp_path, monkeypatch):
    from moss_train.synthesis.rules import RuleWriter

    plan = RuleWriter.plan

    async def fails(self, task):
        if task.timeline.key.endswith("3"):
            raise WriterFault("no_idea", "nothing comes to mind")
        return await plan(self, task)

    monkeypatch.setattr(RuleWriter, "plan", fails)
    made = synth(rendered(clips, tmp_path / "out"))
    assert made["samples"] == 36 and made["reasons"] == {"video: no_idea": 4}
    assert len((tmp_path / "out" / "rejected.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["source=vhs", "out=x"], "source='vhs' is unknown"),
        (["source=rendered", "out=x"], "source=rendered needs path="),
        (["source=activitynet", "out=x", "captions=a.json"], "needs media_root="),
        (["source=rendered", "path=a", "media_root=b", "out=x"], "media_root= has no meaning"),
        (["source=rendered", "path=nowhere", "out=x"], "path=nowhere is not a folder"),
        (["source=samples", "path=nowhere", "out=x"], "nowhere is not a staging folder"),
        (["source=rendered", "path=.", "out=x", "writer=poet"], "writer='poet' is unknown"),
        (["source=rendered", "path=.", "out=x", "fps=0"], "fps=0.0"),
        (["source=rendered", "path=.", "out=x", "seen_at=2"], "seen_at=2.0"),
        (["source=rendered", "path=.", "out=x", "mix.before=-1"], "mix.before=-1.0"),
        (["source=rendered", "path=.", "out=x", "mix.sometimes=1"], "did you mean"),
        (["source=rendered", "path=.", "out=x", "writer=endpoint"], "endpoint.model"),
        (["source=rendered", "path=.", "out=x", "prompts=mine.yaml"], "prompts= has no meaning"),
    ],
)
def test_mistakes_are_named_with_their_remedy(arguments, message, capsys):
    assert main(["data", "synth", *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and message in told and told.count("\n") == 1


def test_folders_that_hold_something_else(clips, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(DataError, match="did not write"):
        synth(rendered(clips, tmp_path / "mine", overwrite=True))
    shutil.copytree(clips / "train" / "realtime", tmp_path / "bare")
    with pytest.raises(DataError, match="bare.captions.json does not exist.*data render"):
        synth(rendered(clips, tmp_path / "out", path=str(tmp_path / "bare")))
    empty = {"k": {"duration": 5.0, "timestamps": [], "sentences": []}}
    (tmp_path / "bare.captions.json").write_text(json.dumps(empty))
    with pytest.raises(DataError, match="none of 1 videos gave a stream; the first: unreadable"):
        synth(rendered(clips, tmp_path / "out", path=str(tmp_path / "bare")))
    with pytest.raises(ConfigError, match="every share of mix is 0"):
        from moss_train.synthesis.command import Mix

        rendered(clips, tmp_path / "out", mix=Mix(0, 0, 0, 0, 0, 0, 0)).validate()
