"""The loader: the same global batches on any number of ranks and workers, exact resume, bad samples masked."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import (
    broken_from,
    caption_json,
    numbered_clip,
    packed_streams,
    read_numbers,
    split_pack,
    stage,
    stage_streams,
    still,
    stream_json,
)
from loader_ranks import TOKENIZER, Ranks, content, loader_of, steps_of

from moss_train.data.config import DataConfig, SourceConfig
from moss_train.data.loader import build_loader
from moss_train.errors import ConfigError, DataError
from moss_train.streams.config import CompilerConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """22 streams in shards of 4."""
    return packed_streams(tmp_path_factory.mktemp("loader"), 22, shard_samples=4)


def test_epochs_hold_every_sample_with_its_own_pictures(folder: Path):
    with loader_of(folder, pack=False) as loader:
        assert loader.steps_per_epoch() == 4
        for epoch in range(2):
            seen = Counter()
            for number in range(4):
                step = next(loader)
                assert (step.epoch, step.step, step.masked) == (epoch, number, 0)
                assert len(step.keys) == 6
                rows = [keys for batch in step.microbatches for keys in batch.keys]
                assert Counter(key for keys in rows for key in keys) == Counter(step.keys)
                for batch in step.microbatches:
                    for row, (key,) in enumerate(batch.keys):
                        pictures = batch.frames_NCHW[batch.frame_rows_N == row].numpy()
                        assert read_numbers(pictures, 32) == [int(key[1:]) + n for n in range(6)]
                seen.update(step.keys)
            assert len(seen) == 22 and sum(seen.values()) == 24


@pytest.mark.parametrize("pack", [True, False])
def test_ranks_and_workers_share_the_same_global_batches(folder: Path, pack: bool):
    alone = steps_of(loader_of(folder, pack=pack), 6)
    for ranks, workers in ((2, 0), (3, 0), (2, 2)):
        parts = [steps_of(loader_of(folder, rank, ranks, workers=workers, pack=pack), 6) for rank in range(ranks)]
        for number, whole in enumerate(alone):
            steps = [part[number] for part in parts]
            assert all(step.keys == whole.keys for step in steps)
            assert len({len(step.microbatches) for step in steps}) == 1
            merged: dict[str, str] = {}
            for step in steps:
                assert not merged.keys() & content(step).keys()
                merged |= content(step)
            assert merged == content(whole)


def test_ranks_without_rows_get_padding(folder: Path):
    """More ranks than rows: the idle rank still runs its microbatch, made of padding."""
    steps = [steps_of(loader_of(folder, rank, 4, global_batch_size=2, pack=True), 1)[0] for rank in range(4)]
    assert {len(step.microbatches) for step in steps} == {1}
    assert sum(len(content(step)) for step in steps) == 2
    idle = [step.microbatches[0] for step in steps if not content(step)]
    assert len(idle) >= 2
    for batch in idle:
        assert (batch.segments_RT == -1).all() and (batch.labels_RT == -100).all() and len(batch.frames_NCHW) == 0


def test_resume_at_every_step_with_other_ranks_and_workers(folder: Path):
    total = 9  # two epochs of four steps, and one more
    whole = steps_of(loader_of(folder), total)
    with loader_of(folder, workers=1) as loader:
        states = [loader.state_dict()]
        for _ in range(total - 1):
            next(loader)
            states.append(json.loads(json.dumps(loader.state_dict())))
    for start, state in enumerate(states):
        ranks = 1 + start % 3
        for rank in range(ranks):
            with loader_of(folder, rank, ranks, workers=start % 2, prefetch=start % 4) as loader:
                next(loader)  # whatever was planned before is forgotten
                loader.load_state_dict(state)
                assert loader.state_dict() == state
                for number in range(start, min(start + 2, total)):
                    step = next(loader)
                    assert (step.epoch, step.step, step.keys) == (whole[number].epoch, number % 4, whole[number].keys)
                    assert content(step).items() <= content(whole[number]).items()


def test_jitter_is_drawn_anew_every_epoch_and_is_the_same_after_a_resume(folder: Path, tmp_path: Path):
    stage(tmp_path / "staging", "long", stream_json("long", 12, text="red green blue " * 8), mp4=numbered_clip(12))
    split_pack(tmp_path / "staging", tmp_path / "one", 9)
    settings = {"global_batch_size": 1, "compiler": CompilerConfig(jitter_probability=0.5, tokens_per_second=10)}
    epochs = [content(step)["long"] for step in steps_of(loader_of(tmp_path / "one", **settings), 6)]
    assert len(set(epochs)) > 2
    assert epochs == [content(step)["long"] for step in steps_of(loader_of(tmp_path / "one", workers=1, **settings), 6)]
    with loader_of(tmp_path / "one", **settings) as loader:
        loader.load_state_dict(loader.state_dict() | {"epoch": 4})
        assert content(next(loader))["long"] == epochs[4]


def test_another_order_refuses_the_state_and_says_what_changed(folder: Path):
    with loader_of(folder) as loader:
        state = loader.state_dict()
    with (
        loader_of(folder, global_batch_size=5) as other,
        pytest.raises(DataError, match="global_batch_size was 6, is 5"),
    ):
        other.load_state_dict(state)
    with loader_of(folder, seed=4) as other, pytest.raises(DataError, match="seed was 3, is 4"):
        other.load_state_dict(state)
    with loader_of(folder) as same, pytest.raises(DataError, match="step 99"):
        same.load_state_dict(state | {"step": 99})


def test_each_clip_is_decoded_once_while_the_cache_has_room(folder: Path):
    with loader_of(folder, workers=1) as loader:
        for _ in range(12):
            next(loader)
        # Prefetched steps are asked for already.
        assert loader.counters()["clips_decoded"] == 22
        assert loader.counters()["clips_cached"] >= 40
    with loader_of(folder, frame_cache_mb=0) as loader:
        for _ in range(12):
            next(loader)
        assert loader.counters()["clips_decoded"] == 72 and loader.counters()["clips_cached"] == 0


def test_a_small_cache_stays_within_its_bound(folder: Path):
    # A clip's tiles take 6 * 3 * 64 * 64 = 73,728 bytes, so 14 clips fit in a MiB.
    with loader_of(folder, frame_cache_mb=1, global_batch_size=22) as loader:
        for _ in range(4):
            next(loader)
            frames = loader._preparer.frames
            assert frames._bytes <= 1 << 20 and len(frames._cache) == 14
            assert frames._bytes == sum(decoded.frames.nbytes for decoded in frames._cache.values())


def test_mixed_sources_stills_and_text(tmp_path: Path):
    stage_streams(tmp_path / "video", 3)
    for number in range(4):
        stage(tmp_path / "still", f"p{number}", caption_json(f"p{number}"), png=still(number))
        stage(tmp_path / "text", f"t{number}", caption_json(f"t{number}", None))
    two = caption_json("two", "0.png", "<|image|> and <|video|>")
    two["media"].append({"id": "m1", "kind": "video", "member": "1.mp4"})
    stage(tmp_path / "still", "two", two, _0_png=still(77), _1_mp4=numbered_clip(2, 4, first=90))
    sources = {}
    for name in ("video", "still", "text"):
        split_pack(tmp_path / name, tmp_path / f"{name}-packed", 3)
        sources[name] = SourceConfig(path=str(tmp_path / f"{name}-packed"), weight=2.0 if name == "text" else 1.0)
    data = DataConfig(sources=sources, global_batch_size=4, micro_batch_rows=1, workers=1, pack=False)
    with build_loader(data, CompilerConfig(fps=4.0), TOKENIZER, 64, 0) as loader:
        figures = loader.summary()
        assert {name: entry.epoch_samples for name, entry in figures.items()} == {"video": 3, "still": 5, "text": 8}
        assert figures["text"].modalities == {"text": 4} and figures["text"].passes == 2.0
        assert figures["still"].modalities == {"image": 4, "video": 1} and figures["video"].mean_frames == 6.0
        assert sum(entry.frame_share for entry in figures.values()) == pytest.approx(1.0)
        assert figures["still"].frame_share == pytest.approx(7 / (7 + 18)) and figures["text"].frame_share == 0.0
        assert loader.steps_per_epoch() == 4
        for step in (next(loader) for _ in range(4)):
            assert step.masked == 0 and sum(counts.streams for counts in step.sources.values()) == 4
            told = {name: [counts.streams, counts.tokens, counts.frames] for name, counts in step.sources.items()}
            met = {name: [0, 0, 0] for name in told}
            for batch in step.microbatches:
                (key,), (source,) = batch.keys[0], batch.sources[0]
                real = batch.segments_RT >= 0
                met[source] = [n + m for n, m in zip(met[source], [1, int(real.sum()), batch.frames], strict=True)]
                assert (batch.origins_RT[real] == list(sources).index(source)).all()
                assert (batch.origins_RT[~real] == -1).all()
                numbers = read_numbers(batch.frames_NCHW.numpy(), 32)
                assert batch.frames_NCHW.shape[1:] == (3, 64, 64)
                if source == "text":
                    assert numbers == []
                elif key == "two":
                    assert numbers == [77, 90, 91]
                elif source == "still":
                    assert numbers == [int(key[1:])]
                else:
                    assert source == "video" and len(numbers) == 6
            assert met == told


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Ten good streams and four bad ones: broken JSON, absent medium, unreadable clip, clip that breaks off."""
    staging, out = tmp_path / "staging", tmp_path / "damaged"
    stage_streams(staging, 10)
    stage(staging, "json", b'{"schema": "moss_train/stream@1"')
    stage(staging, "absent", stream_json("absent"))
    stage(staging, "noise", stream_json("noise"), mp4=numbered_clip(6, 4)[:64] + bytes(3000))
    # The first picture decodes, so the index finds nothing wrong.
    clip = broken_from(numbered_clip(12, 4, gop=2, options={"bf": "0"}), packet=5)
    stage(staging, "breaks", stream_json("breaks"), mp4=clip)
    split_pack(staging, out, 5)
    return out


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_samples_are_masked_and_written_to_the_ledger(damaged: Path, tmp_path: Path, workers: int):
    ledger = tmp_path / "run" / "quarantine.jsonl"
    with loader_of(damaged, quarantine=ledger, workers=workers, max_bad_fraction=0.5, global_batch_size=7) as loader:
        assert loader.steps_per_epoch() == 2 and loader.summary()["main"].faulty == 3
        steps = [next(loader) for _ in range(4)]  # two epochs
        assert loader.counters()["quarantined"] == 4 and loader.counters()["masked"] >= 2
        # The clip that breaks off is not tried again in the second epoch (unless that was planned ahead already).
        assert loader.counters()["clips_decoded"] in ((11,) if workers == 0 else (11, 12))
    # What does not compile is left out of the order and told of before anything is trained.
    assert {fault.key for fault in steps[0].quarantined} >= {"json", "absent", "noise"}
    for epoch in (steps[:2], steps[2:]):
        assert sum(step.masked for step in epoch) == sum(step.keys.count("breaks") for step in epoch) >= 1
        delivered = {key for step in epoch for key in content(step)}
        assert sorted(delivered) == [f"s{number:03d}" for number in range(10)]
        assert {key for step in epoch for key in step.keys} == {*delivered, "breaks"}
    entries = {entry["key"]: entry for entry in map(json.loads, ledger.read_text().splitlines())}
    assert len(ledger.read_text().splitlines()) == 4 and set(entries) == {"json", "absent", "noise", "breaks"}
    assert "not JSON" in entries["json"]["reason"] and entries["json"]["backend"] == "compiler"
    assert "absent.mp4" in entries["absent"]["reason"]
    assert "cannot be read" in entries["noise"]["reason"]
    assert "does not decode" in entries["breaks"]["reason"] and entries["breaks"]["backend"] == "auto"
    assert "Error" in entries["breaks"]["exception"]
    for entry in entries.values():
        assert entry["source"] == "main" and entry["shard"].startswith("shard-00000")
        assert entry["epoch"] == (0 if entry["key"] == "breaks" else None)


def keys_of(ledger: Path) -> list[str]:
    return sorted(json.loads(line)["key"] for line in ledger.read_text().splitlines())


def test_ranks_agree_on_what_one_alone_could_not_decode(damaged: Path, tmp_path: Path):
    ledger = tmp_path / "quarantine.jsonl"
    settings = {"max_bad_fraction": 0.5, "global_batch_size": 7}
    alone = steps_of(loader_of(damaged, **settings), 4)
    ranks = Ranks(damaged, 2, ledger, **settings)
    for whole in alone:
        steps = ranks.step()
        assert len({len(step.microbatches) for step in steps}) == 1
        assert content(steps[0]) | content(steps[1]) == content(whole)
        assert [step.masked for step in steps] == [whole.masked] * 2
        assert steps[0].quarantined == steps[1].quarantined
        assert {f.key for f in steps[0].quarantined} == {f.key for f in whole.quarantined}
    ranks.close()
    assert keys_of(ledger) == ["absent", "breaks", "json", "noise"]
    for loader in ranks.loaders:
        counters = loader.counters()
        assert (counters["quarantined"], counters["streams"]) == (4, 28 - sum(step.masked for step in alone))


def test_all_ranks_stop_together_when_the_budget_is_exceeded(damaged: Path, tmp_path: Path):
    # Three do not compile, which the budget of three still allows.
    ranks = Ranks(damaged, 3, tmp_path / "quarantine.jsonl", max_bad_fraction=0.2, global_batch_size=11)
    errors = ranks.step()
    ranks.close()
    assert all(isinstance(error, DataError) and "4 of the 14 samples" in str(error) for error in errors)
    assert len(keys_of(tmp_path / "quarantine.jsonl")) == 4


def test_what_one_rank_cannot_read_stops_all(folder: Path, tmp_path: Path, monkeypatch):
    ranks = Ranks(folder, 2, tmp_path / "quarantine.jsonl")

    def gone(*_: object) -> None:
        raise DataError("the disk is gone")

    monkeypatch.setattr(ranks.loaders[1]._preparer.frames, "request_all", gone)
    first, second = ranks.step()
    ranks.close()
    assert str(first) == "rank 1: the disk is gone" and str(second) == "the disk is gone"


def test_counts_survive_a_resume_and_no_line_is_doubled(damaged: Path, tmp_path: Path):
    ledger = tmp_path / "quarantine.jsonl"
    settings = {"max_bad_fraction": 0.5, "global_batch_size": 7}
    whole = steps_of(loader_of(damaged, quarantine=ledger, **settings), 4)
    before = ledger.read_text()
    ranks = Ranks(damaged, 2, ledger, **settings)
    steps = ranks.step()
    ranks.close()
    assert [loader.counters()["quarantined"] for loader in ranks.loaders] == [4, 4]
    assert [step.masked for step in steps] == [whole[0].masked] * 2 and not steps[0].quarantined
    assert ledger.read_text() == before
    # The budget counts what an earlier run has met.
    with (
        loader_of(damaged, quarantine=ledger, max_bad_fraction=0.2) as loader,
        pytest.raises(DataError, match="4 of the 14"),
    ):
        next(loader)
    # Faults of other data do not count.
    ledger.write_text(before.replace('"fingerprint": "', '"fingerprint": "0'))
    with loader_of(damaged, quarantine=ledger, **settings) as loader:
        assert sum(len(next(loader).quarantined) for _ in range(2)) == 4 == loader.counters()["quarantined"]
    ledger.write_text(before + '{"key"')
    with pytest.raises(DataError, match="quarantine.jsonl line 5 is no entry"):
        loader_of(damaged, quarantine=ledger, **settings)


def test_too_many_bad_samples_stop_the_run(damaged: Path, tmp_path: Path):
    ledger = tmp_path / "quarantine.jsonl"
    with loader_of(damaged, quarantine=ledger, max_bad_fraction=0.14) as loader, pytest.raises(DataError) as caught:
        for _ in range(3):
            next(loader)
    assert "3 of the 14 samples of source 'main' are bad" in str(caught.value) and str(ledger) in str(caught.value)
    assert len(keys_of(ledger)) >= 3
    with loader_of(damaged, max_bad_fraction=0.0) as loader, pytest.raises(DataError, match="3 of the 14"):
        for _ in range(3):
            next(loader)


def test_streams_over_budget_are_left_out_and_counted(tmp_path: Path):
    stage_streams(tmp_path / "staging", 4)
    stage(tmp_path / "staging", "long", stream_json("long", 12, text="red " * 300), mp4=numbered_clip(12))
    split_pack(tmp_path / "staging", tmp_path / "out", 9)
    with loader_of(tmp_path / "out", global_batch_size=5) as loader:
        step = next(loader)
        assert step.masked == 0 and set(step.keys) == set(content(step)) == {f"s00{n}" for n in range(4)}
        assert loader.summary()["main"].over_budget == 1 and loader.counters()["quarantined"] == 0
    for budget in ({"pack_text_tokens": 5}, {"pack_frames": 2}):
        ((name, value),) = budget.items()
        with pytest.raises(DataError, match=f"all 5 samples of source 'main' are longer than a row.*{name}={value}"):
            loader_of(tmp_path / "out", **budget)


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_are_used_up_are_delivered_to_their_end(folder: Path, workers: int):
    source = SourceConfig(path=str(folder), max_epochs=1.0)
    data = DataConfig(sources={"main": source}, global_batch_size=6, workers=workers, prefetch=3)
    with build_loader(data, CompilerConfig(), TOKENIZER, 64, 0) as loader:
        assert len([next(loader) for _ in range(4)]) == loader.steps_per_epoch(0)
        with pytest.raises(DataError, match="max_epochs"):
            next(loader)


def test_streams_over_budget_can_be_split(tmp_path: Path):
    stage_streams(tmp_path / "staging", 2)
    stage(tmp_path / "staging", "long", stream_json("long", 16, text="red " * 40), mp4=numbered_clip(16))
    split_pack(tmp_path / "staging", tmp_path / "out", 9)
    compiler = CompilerConfig(tokens_per_second=20.0)
    whole = steps_of(loader_of(tmp_path / "out", global_batch_size=3, compiler=compiler), 1)[0]
    assert whole.sources["main"].streams == 3 and whole.sources["main"].frames == 28
    limits = {"pack_text_tokens": 110, "pack_frames": 8, "over_budget": "split", "compiler": compiler}
    for workers in (0, 1):
        loader = loader_of(tmp_path / "out", global_batch_size=5, workers=workers, **limits)
        figures = loader.summary()["main"]
        assert (figures.split, figures.over_budget, figures.samples) == (1, 0, 3) and figures.units >= 4
        (step,) = steps_of(loader, 1)
        assert Counter(step.keys)["long"] >= 2
        numbers = []
        for batch in step.microbatches:
            assert batch.ids_RT.shape[1] <= 110 and int(batch.frame_counts_R.max()) <= 8
            for row, keys in enumerate(batch.keys):
                first = 0
                for segment, key in enumerate(keys):
                    here = batch.segments_RT[row] == segment
                    count = int(batch.visible_hi_RT[row][here].max()) - first
                    own = (batch.frame_rows_N == row) & (batch.frame_slots_N >= first)
                    own &= batch.frame_slots_N < first + count
                    numbers += read_numbers(batch.frames_NCHW[own], 32) if key == "long" else []
                    first += count
        assert sorted(numbers) == list(range(16)), "every picture of the stream is shown in one of its parts"


def test_packed_rows_keep_their_budgets(folder: Path):
    for step in steps_of(loader_of(folder, pack_text_tokens=120, pack_frames=13, global_batch_size=11), 4):
        for batch in step.microbatches:
            assert batch.ids_RT.shape[1] <= 120 and int(batch.frame_counts_R.max()) <= 13
            assert batch.rows <= 2


def test_settings_that_cannot_work_are_refused(folder: Path, tmp_path: Path):
    for wrong in ({"global_batch_size": 0}, {"decoder": "vlc"}, {"max_bad_fraction": 2.0}, {"workers": -1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            loader_of(folder, **wrong)
    with pytest.raises(ConfigError, match="sources is empty"):
        build_loader(DataConfig(), CompilerConfig(), TOKENIZER, 64, 0)
    with pytest.raises(ConfigError, match="data rank 2"):
        loader_of(folder, 2, 2)
    with pytest.raises(DataError, match="not a folder"):
        loader_of(tmp_path / "nowhere")
    twice = {name: SourceConfig(name="x", path=str(folder)) for name in ("a", "b")}
    with pytest.raises(ConfigError, match="two sources of one name"):
        build_loader(DataConfig(sources=twice), CompilerConfig(), TOKENIZER, 64, 0)


def test_closing_ends_the_decoder_processes(folder: Path):
    loader = loader_of(folder, workers=2)
    next(loader)
    processes = [process._process for process in loader._preparer.frames.pool._processes.values()]
    assert processes and all(process.poll() is None for process in processes)
    loader.close()
    loader.close()
    assert all(process.poll() is not None for process in processes)
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


def test_frames_are_uint8_and_normalised_elsewhere(folder: Path):
    batch = steps_of(loader_of(folder), 1)[0].microbatches[0]
    assert batch.frames_NCHW.dtype == torch.uint8 and int(batch.frames_NCHW.max()) > 200
    assert np.isin(batch.kinds_RT.numpy(), range(7)).all()
