"""Augmentations that change lengths: measured beforehand, drawn anew every epoch, the same on any number of ranks."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data_samples import caption_json, numbered_clip, stage, still
from loader_ranks import TOKENIZER, content, loader_of, steps_of

from moss_train.data.config import DataConfig
from moss_train.data.corpus import load_source
from moss_train.data.order import drawn_variant, variation_seed
from moss_train.data.shards.lengths import lengths_of, stored_lengths
from moss_train.data.shards.pack import pack
from moss_train.errors import DataError
from moss_train.streams.config import AugmentationConfig, CompilerConfig
from moss_train.streams.split import RowBudget

AUGMENT = AugmentationConfig(corruption=0.5, interruption=0.5, variants=3, keep_silence=0.5, keep_silence_within_s=0.25)
COMPILER = CompilerConfig(tokens_per_second=8.0, jitter_probability=0.3, augment=AUGMENT)
FRAMES = 12


def stream_of(number: int) -> dict:
    """A long answer, a revision of it and another answer at four frames a second."""

    def said(name: str, t: float, text: str, **more) -> dict:
        return {"id": name, "t": t, "role": "assistant", "kind": "speak", "text": text, **more}

    return {
        "schema": "moss_train/stream@1",
        "id": f"s{number:03d}",
        "media": [{"id": "v0", "kind": "video", "member": "mp4"}],
        "sampling": {"fps": 4.0, "start_s": 0.0, "end_s": 3.0},
        "events": [
            {"id": "q", "t": 0.0, "role": "user", "text": "Which colour?"},
            said("a", 0.25, "It is red" + " now" * (1 + number % 4)),
            said("b", 1.5, "It is blue", kind="revise", supersedes="a", evidence=[1.25, 1.5]),
            said("c", 2.25, "Two" + " blocks" * (number % 3)),
        ],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Sixteen streams and a still."""
    folder = tmp_path_factory.mktemp("variants")
    for number in range(16):
        stage(folder / "staging", f"s{number:03d}", stream_of(number), mp4=numbered_clip(FRAMES, first=number))
    stage(folder / "staging", "t000", caption_json("t000", "png"), png=still(1))
    pack(folder / "staging", folder / "packed")
    return folder / "packed"


def corpus_of(folder: Path, compiler: CompilerConfig = COMPILER):
    return load_source(folder, TOKENIZER, compiler, 64, DataConfig())


@pytest.mark.parametrize("budget", [None, RowBudget(40, 8)])
def test_the_table_holds_the_lengths_of_every_variant(folder: Path, budget):
    corpus, seed = corpus_of(folder), 7
    lengths = lengths_of(corpus, budget, seed=seed)
    assert lengths.variant_tokens.shape == lengths.variant_frames.shape == (len(lengths.samples), 3)
    for number in range(len(corpus)):
        of_sample = lengths.samples == number
        for variant in range(4):
            variation = variation_seed(seed, corpus.key(number), variant)
            parts = corpus.compile_all(number, budget, np.random.default_rng(variant), variation)
            tokens = lengths.variant_tokens[of_sample, variant - 1] if variant else lengths.tokens[of_sample]
            frames = lengths.variant_frames[of_sample, variant - 1] if variant else lengths.frames[of_sample]
            assert [len(part.ids) for part in parts] == tokens.tolist()
            assert [len(part.frames) for part in parts] == frames.tolist()
    assert (lengths.variant_tokens != lengths.tokens[:, None]).mean() > 0.2
    again = stored_lengths(corpus_of(folder), budget, seed)
    assert again is not None and again.digest == lengths.digest
    assert again.variant_tokens.tolist() == lengths.variant_tokens.tolist()


def test_what_other_variants_depend_on(folder: Path):
    first = lengths_of(corpus_of(folder), seed=7)
    others = [AugmentationConfig(**vars(AUGMENT) | change) for change in (
        {"corruption": 0.25}, {"variants": 2}, {"correction_prefix": "No, "}, {"interruption_texts": ["Wait."]},
    )]  # fmt: skip
    digests = {
        lengths_of(corpus_of(folder, CompilerConfig(tokens_per_second=8.0, augment=augment)), seed=7).digest
        for augment in others
    }
    digests |= {first.digest, lengths_of(corpus_of(folder), seed=8).digest}
    assert len(digests) == 6
    # nothing depends on the seed, or on words that nobody says, where lengths do not change
    idle = AugmentationConfig(correction_prefix="No, ", keep_silence=0.5)
    plain = lengths_of(corpus_of(folder, CompilerConfig(tokens_per_second=8.0)))
    same = lengths_of(corpus_of(folder, CompilerConfig(tokens_per_second=8.0, augment=idle)), seed=9)
    assert same.digest == plain.digest and plain.variant_tokens.shape == (17, 0)


def test_the_draw_of_an_epoch():
    drawn = Counter(drawn_variant(3, epoch, f"k{key}", 0.75, 3) for epoch in range(20) for key in range(200))
    assert drawn[0] / 4000 == pytest.approx(0.25, abs=0.03)
    for variant in (1, 2, 3):
        assert drawn[variant] / 4000 == pytest.approx(0.25, abs=0.03)
    assert {drawn_variant(3, 0, "k", 1.0, 1) for _ in range(3)} == {1} and drawn_variant(3, 0, "k", 0.0, 0) == 0


@pytest.mark.parametrize("over_budget", ["skip", "split"])
def test_ranks_workers_and_a_resume_share_the_same_rows(folder: Path, tmp_path: Path, over_budget: str):
    settings = {"compiler": COMPILER, "over_budget": over_budget, "global_batch_size": 6}
    settings |= {"pack_text_tokens": 60, "pack_frames": 12} if over_budget == "skip" else {}
    settings |= {"pack_text_tokens": 40, "pack_frames": 8} if over_budget == "split" else {}
    if over_budget == "split":  # parts of one sample share its key, so a step is compared as a whole
        settings["global_batch_size"] = 1
    alone = steps_of(loader_of(folder, **settings), 6)
    for ranks, workers in ((3, 0),) if over_budget == "split" else ((2, 1),):
        parts = [steps_of(loader_of(folder, rank, ranks, workers=workers, **settings), 6) for rank in range(ranks)]
        for number, whole in enumerate(alone):
            merged: dict[str, str] = {}
            for part in parts:
                merged |= content(part[number])
            assert merged == content(whole)
    with loader_of(folder, **settings) as loader:
        for _ in range(4):
            next(loader)
        state = json.loads(json.dumps(loader.state_dict()))
    with loader_of(folder, 1, 2, **settings) as first, loader_of(folder, 0, 2, **settings) as second:
        for loader in (first, second):
            loader.load_state_dict(state)
        for whole in alone[4:]:
            assert content(next(first)) | content(next(second)) == content(whole)
    with loader_of(folder, **settings, seed=4) as loader, pytest.raises(DataError, match="seed was 3, is 4"):
        loader.load_state_dict(state)
    changed = settings | {"compiler": CompilerConfig(tokens_per_second=8.0, jitter_probability=0.3)}
    with loader_of(folder, **changed) as loader, pytest.raises(DataError, match="compiler.augment.corruption was 0.5"):
        loader.load_state_dict(state)


def test_epochs_differ_and_show_the_sample_itself_now_and_then(folder: Path):
    augment = AugmentationConfig(corruption=0.5, interruption=0.5, variants=3)
    settings = {"global_batch_size": 17, "pack_text_tokens": 100}
    (plain,) = steps_of(loader_of(folder, **settings, compiler=CompilerConfig(tokens_per_second=8.0)), 1)
    itself, rows = 0, Counter()
    compiler = CompilerConfig(tokens_per_second=8.0, augment=augment)
    for step in steps_of(loader_of(folder, **settings, compiler=compiler), 8):
        shown = content(step)
        assert shown.keys() == content(plain).keys() and shown["t000"] == content(plain)["t000"]  # a still is one
        itself += sum(shown[key] == digest for key, digest in content(plain).items() if key != "t000")
        rows.update(shown.items())
    assert 0.1 < itself / (8 * 16) < 0.5  # a quarter, and variants in which nothing could be changed
    assert len(rows) > 2 * 17


def test_a_variant_that_is_longer_than_a_row_gives_way(folder: Path):
    augment = AugmentationConfig(interruption=1.0, interruption_texts=["Stop. " * 30], variants=2)
    compiler = CompilerConfig(tokens_per_second=8.0, augment=augment)
    plain = CompilerConfig(tokens_per_second=8.0)
    lengths = lengths_of(corpus_of(folder, compiler), seed=3)
    assert (lengths.variant_tokens[:16] > 100).all() and lengths.tokens.max() <= 100
    settings = {"global_batch_size": 17, "pack_text_tokens": 100}
    (step,) = steps_of(loader_of(folder, **settings, compiler=compiler), 1)
    (expected,) = steps_of(loader_of(folder, **settings, compiler=plain), 1)
    assert content(step) == content(expected)
