"""The behaviour bench: what it asks, what it remembers, and what it concludes; trained runs are a slow test."""

import json
from pathlib import Path

import pytest

from moss_train.bench.behaving import runs
from moss_train.bench.behaving.runs import Place, Run, carry_out, finished
from moss_train.bench.behaving.table import cost, summary, synth_gap
from moss_train.bench.behaving.variants import FIGURES, FULL, SHARED, SYNTH, VARIANTS
from moss_train.bench.behaviour import BehaviourOptions, behaviour_command
from moss_train.errors import ConfigError, DataError
from moss_train.train.compose import compose_run

GOOD = {
    "speak_f1": 0.98,
    "silence_f1": 0.99,
    "answer_accuracy": 0.97,
    "revision_accuracy": 0.96,
    "revision_delay_frames": 0.1,
    "false_revision_rate": 0.01,
    "offline_accuracy": 0.95,
}


def place_in(folder: Path) -> Place:
    return Place(folder, (), 1, 300.0)


def row(seed: int, variant: str, **changes: float) -> dict:
    return {"seed": seed, "variant": variant, "training_s": 10.0, "figures": GOOD | changes}


def rows_of(*rows: dict) -> dict:
    return {(one["seed"], one["variant"]): one for one in rows}


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.trains])
def test_every_variant_is_a_recipe_that_differs_in_one_piece(tmp_path: Path, name: str):
    full, other = (
        compose_run(Run(1, variant).command(place_in(tmp_path))[1:]).stages["realtime"]
        for variant in (FULL, VARIANTS[name])
    )
    assert (other != full) == (name != FULL.name)


def test_earlier_stages_are_trained_once_a_seed_and_shared(tmp_path: Path):
    place = place_in(tmp_path)
    shared = compose_run(Run(2, None).command(place)[1:])
    assert [name for name, _ in shared.ordered_stages()] == ["align", "temporal", "sft"] and shared.seed == 2
    realtime = compose_run(Run(2, FULL).command(place)[1:])
    assert list(realtime.stages) == ["realtime"] and realtime.stages["realtime"].init == shared.output_dir
    assert Run(2, VARIANTS["no_realtime"]).command(place) == []


def test_what_is_recorded_is_not_done_again(tmp_path: Path, monkeypatch):
    commands = []

    def train(arguments, place, folder, limit_s):
        commands.append((arguments[0], folder.name))
        if arguments[0] == "eval":
            out = folder / "evaluation"
            out.mkdir(parents=True)
            (out / "report.json").write_text(json.dumps({"figures": GOOD}))
            if folder.name == "no_jitter" and len(commands) < 8:
                raise DataError("killed")

    composed = []

    def compose(overrides):
        composed.append(tuple(overrides))
        return compose_run(overrides)

    monkeypatch.setattr(runs, "compose_run", compose)
    monkeypatch.setattr(runs, "_moss_train", train)
    place = place_in(tmp_path)
    todo = [Run(1, None), *(Run(1, VARIANTS[name]) for name in ("full", "no_realtime", "no_jitter"))]
    with pytest.raises(DataError, match="killed"):
        carry_out(todo, place, 1, lambda _: None)
    assert set(finished(place)) == {(1, SHARED), (1, "full"), (1, "no_realtime")}
    with place.record.open("a") as file:
        file.write('{"seed": 1, "var')  # a kill in the middle of a line
    monkeypatch.setattr(runs, "_moss_train", lambda arguments, *_: commands.append(("again", arguments[0])))
    (tmp_path / "seed1" / "no_jitter" / "evaluation").mkdir(parents=True, exist_ok=True)
    done = carry_out(todo, place, 1, lambda _: None)
    assert set(done) == {(1, SHARED), (1, "full"), (1, "no_realtime"), (1, "no_jitter")}
    assert [command for command in commands if command[0] == "again"] == [("again", "train"), ("again", "eval")]
    assert finished(place) == done, "what came after the line that was cut off is read too"
    other = Place(tmp_path, ("stages.*.optim.clip=0.5",), 1, 300.0)
    assert not finished(other), "another recipe is another run"
    place.clips.parent.mkdir(exist_ok=True)
    place.clips.write_text("other clips")
    assert not finished(place)
    assert len(composed) == len(set(composed)) == 6, "each of the three trainings, in both recipes, once"


def test_verdict():
    good = rows_of(*(row(seed, name) for seed in (1, 2) for name in VARIANTS))
    result = summary(good, list(VARIANTS))
    assert result["ok"] and result["figures"]["full.speak_f1"] == 0.98 and result["figures"]["full.speak_f1.std"] == 0
    assert {f"{name}.{figure}" for name in VARIANTS for figure in FIGURES} <= set(result["figures"])
    bad = good | rows_of(row(1, "full", speak_f1=0.9, offline_accuracy=0.9), row(1, SYNTH.name, revision_accuracy=0.5))
    failures = " ".join(summary(bad, list(VARIANTS))["failures"])
    assert "full.speak_f1 is 0.9400, below 0.97" in failures
    assert "offline_lost is 0.0250" in failures and "synth_gap is 0.2300" in failures
    assert summary(bad, list(VARIANTS), targets=False)["ok"]
    assert "full.speak_f1 was not measured" in summary({}, ["full"])["failures"]


def test_costs_are_told_where_they_exceed_the_spread():
    rows = rows_of(
        row(1, "full"), row(2, "full", speak_f1=0.96), row(1, "no_jitter"), row(2, "no_jitter"),
        row(1, "offline_mask", speak_f1=0.5, revision_delay_frames=1.1), row(2, "offline_mask", speak_f1=0.52),
    )  # fmt: skip
    figures = summary(rows, ["full", "no_jitter", "offline_mask"])["figures"]
    assert cost(figures, "no_jitter") == "nothing"
    assert cost(figures, "offline_mask") == "speak_f1 -0.460"
    assert synth_gap(figures) is None


def test_options():
    with pytest.raises(ConfigError, match="variants: no_such"):
        BehaviourOptions(variants=["no_such"]).validate()
    with pytest.raises(ConfigError, match="seeds"):
        BehaviourOptions(seeds=[1, 1]).validate()
    assert BehaviourOptions(variants=["synth", "full"]).names == ["full", "synth"]


@pytest.mark.slow
def test_quick(tmp_path: Path, capsys):
    options = BehaviourOptions(out=str(tmp_path), seeds=[1], variants=["full", "no_realtime", "synth"], quick=True)
    assert behaviour_command(options) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["ok"] and result["figures"]["full.speak_f1"] >= 0.0


def test_a_folder_of_another_run_is_not_gone_on_with(tmp_path: Path):
    folder = tmp_path / "seed1" / "full"
    runs._begin(folder, "one")
    (folder / "checkpoint").write_text("half a run")
    runs._begin(folder, "one")
    assert (folder / "checkpoint").is_file()  # a kill: it goes on
    runs._begin(folder, "two")
    assert not (folder / "checkpoint").exists()
