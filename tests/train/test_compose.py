"""Recipes and overrides: what they amount to, and what is refused before anything starts."""

import pytest
import yaml

from moss_train.errors import ConfigError
from moss_train.locations import shipped_directory
from moss_train.train.compose import available, compose_run, resolved_dict, run_from_dict


@pytest.mark.parametrize("recipe", available("recipe"))
def test_every_recipe_composes_and_survives_saving(recipe):
    run = compose_run([f"recipe={recipe}"])
    assert run_from_dict(resolved_dict(run)) == run


@pytest.mark.parametrize("model", available("model"))
def test_every_model_composes(model):
    assert compose_run(["recipe=realtime", f"model={model}"]).model.name == model


@pytest.mark.parametrize("layout", available("layout"))
def test_every_layout_composes(layout, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "64")
    said = yaml.safe_load((shipped_directory("recipes") / "layout" / f"{layout}.yaml").read_text())
    for model in ("moss_video_11b", "moss_video_90b", "llama_3_2_vision_90b"):
        run = compose_run(["recipe=pipeline", f"layout={layout}", f"model={model}"])
        assert {name: getattr(run.layout, name) for name in said} == said


def test_the_real_time_stage_of_a_recipe_can_learn_from_synthesised_dialogues():
    for recipe in ("quickstart", "quickstart_smoke", "pipeline", "realtime"):
        plain, synth = (compose_run([f"recipe={recipe}", *more]) for more in ([], ["data=synth"]))
        assert compose_run([f"recipe={recipe}", "data=rendered"]) == plain
        sources = synth.stages["realtime"].data.sources
        assert sources["realtime"].path == f"{synth.data_root}/realtime_synth"
        sources["realtime"].path = f"{synth.data_root}/realtime"
        assert synth == plain  # nothing else differs
    with pytest.raises(ConfigError, match="data=synth: this recipe has no stage 'realtime'"):
        compose_run(["recipe=sft", "data=synth"])
    with pytest.raises(ConfigError, match="unknown data 'sinth'; did you mean synth"):
        compose_run(["recipe=quickstart", "data=sinth"])


def test_published_recipes_train_in_bfloat16_and_those_for_any_machine_in_float32():
    precision = {recipe: compose_run([f"recipe={recipe}"]).precision for recipe in available("recipe")}
    published = {"align", "temporal", "sft", "realtime", "pipeline", "reference_zero2"}
    assert precision == {recipe: "bf16" if recipe in published else "fp32" for recipe in precision}


def test_published_hyperparameters():
    stages = compose_run(["recipe=pipeline"]).stages
    # name: lr, frames per second, fewest, most frames, tokens, trained
    published = {
        "align": (2e-5, 2.0, 8, 64, 4096, "vision_projector_xattn"),
        "temporal": (1e-5, 1.0, 8, 256, 8192, "all"),
        "sft": (1e-5, 1.0, 8, 256, 8192, "all"),
        "realtime": (2e-5, 1.0, 1, 256, 4096, "all"),
    }
    assert list(stages) == list(published)
    for name, stage in stages.items():
        compiler, optim = stage.compiler, stage.optim
        found = (optim.lr, compiler.fps, compiler.min_frames, compiler.max_frames, stage.data.pack_text_tokens)
        assert (*found, stage.trainable) == published[name]
        assert (optim.warmup, optim.warmup_fraction, optim.schedule) == ("logarithmic", 0.1, "linear")
        assert (optim.clip, optim.betas) == (1.0, [0.9, 0.999])
        assert set(stage.objective.weights.values()) == {1.0, 0.0} and stage.objective.focal_gamma == 0.0


def test_the_reference_trainers_settings_under_deepspeed():
    run = compose_run(["recipe=reference_zero2"])
    assert (run.engine.name, run.layout.zero, run.precision) == ("deepspeed", 2, "bf16")
    rates = {name: stage.optim.lr for name, stage in run.stages.items()}
    assert rates == {"align": 2e-5, "sft": 1e-5, "realtime": 2e-5}
    for stage in run.stages.values():
        assert (stage.optim.warmup, stage.optim.schedule, stage.optim.clip) == ("logarithmic", "linear", 1.0)
        assert (stage.data.pack, stage.data.micro_batch_rows, stage.data.shuffle) == (False, 1, False)


def test_the_command_line_wins_over_the_recipe():
    run = compose_run(["recipe=realtime", "model=tiny", "stages.realtime.optim.lr=1e-4", "output_dir=a b=c"])
    assert (run.model.name, run.stages["realtime"].optim.lr, run.output_dir) == ("tiny", 1e-4, "a b=c")


def test_a_wildcard_reaches_every_stage():
    run = compose_run(["recipe=pipeline", "stages.*.steps=7", "stages.sft.steps=9"])
    assert [stage.steps for _, stage in run.ordered_stages()] == [7, 7, 9, 7]


def test_dict_fields_gain_entries_and_keep_their_own():
    run = compose_run(
        ["recipe=realtime", "stages.realtime.data.sources.mine.path=/x", "stages.*.objective.weights.revision=3"]
    )
    stage = run.stages["realtime"]
    assert {name: source.path for name, source in stage.data.sources.items()} == {
        "realtime": "data/realtime",
        "mine": "/x",
    }
    assert stage.objective.weights["revision"] == 3.0 and stage.objective.weights["text"] == 1.0


def test_a_part_that_is_null_can_be_set_whole_and_by_field():
    given = {"factor": 4, "low_frequency_factor": 1, "high_frequency_factor": 2, "original_max_positions": 64}
    fields = [f"model.text.rope_scaling.{name}={value}" for name, value in given.items()]
    whole = "model.text.rope_scaling={" + ", ".join(f"{name}: {value}" for name, value in given.items()) + "}"
    for overrides in (fields, [whole]):
        scaling = compose_run(["recipe=realtime", "model=tiny", *overrides]).model.text.rope_scaling
        assert vars(scaling) == given
    published = compose_run(["recipe=realtime", "model.text.rope_scaling.factor=4"]).model.text.rope_scaling
    assert (published.factor, published.original_max_positions) == (4, 8192)
    assert compose_run(["recipe=realtime", "model.text.rope_scaling=null"]).model.text.rope_scaling is None


@pytest.mark.parametrize("name", available("objective"))
def test_every_objective_composes_as_published(name):
    #: gamma, balance, position weight, weight of idle and of stop silence, decision head's
    published = {
        "reference": (0.0, "none", None, 1.0, 1.0, None),
        "silence_weight": (0.0, "none", None, 0.1, 0.1, None),
        "moss_vl": (2.0, "state", None, 1.0, 1.0, None),
        "streamo": (2.0, "state", None, 1.0, 1.0, None),
        "videollm_online": (0.0, "none", 1.0, 1.0, 1.0, None),
        "dispider": (0.0, "none", None, 1.0, 1.0, 1.0),
    }
    head = f"model.decision_head={name == 'dispider'}".lower()
    run = compose_run(["recipe=pipeline", head, f"stages.realtime.objective={name}"])
    for stage_name, stage in run.stages.items():
        chosen, weights = stage.objective, stage.objective.weights
        silences = weights["idle_silence"], weights["stop_silence"]
        found = (chosen.focal_gamma, chosen.balance, chosen.frame_position_weight, *silences)
        wanted = published[name if stage_name == "realtime" else "reference"]
        assert (*found, chosen.decision_head_weight) == wanted
        assert chosen.normaliser == "valid" and chosen.margin is None
        assert weights["text"] == weights["onset"] == weights["revision"] == 1.0 and weights["stale"] == 0.0


def test_an_objective_is_chosen_for_every_stage_and_changed_further(tmp_path):
    # the recipe's own weight of revisions gives way to the named objective's, a field on the command line does not
    chosen = ["recipe=quickstart", "stages.*.objective.focal_gamma=1.5", "stages.*.objective=moss_vl"]
    for stage in compose_run(chosen).stages.values():
        assert (stage.objective.balance, stage.objective.focal_gamma) == ("state", 1.5)
        assert stage.objective.weights["revision"] == 1.0
    (tmp_path / "objective").mkdir()
    (tmp_path / "objective" / "mine.yaml").write_text("margin: 2.0\n")
    run = compose_run(["recipe=quickstart", f"recipes={tmp_path}", "stages.realtime.objective=mine"])
    assert run.stages["realtime"].objective.margin == 2.0
    given = compose_run(["recipe=realtime", "stages.realtime.objective={focal_gamma: 1.0}"]).stages["realtime"]
    assert given.objective.focal_gamma == 1.0


def test_own_recipe_files(tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - /stage@stages.short: realtime\n  - override /model: bench\nname: mine\n"
        "stages:\n  short:\n    steps: 3\n"
    )
    run = compose_run([f"recipes={tmp_path}", "recipe=mine"])
    assert (run.model.name, run.output_dir, run.stages["short"].steps) == ("bench", "outputs/mine", 3)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model=tiny"], "recipe=realtime"),
        (["recipe=realtim"], "did you mean realtime"),
        (["recipe=realtime", "model=tinny"], "did you mean tiny"),
        (["recipe=realtime", "stages.realtime.optim.lrr=1"], "stages.realtime.optim.lr"),
        (["recipe=realtime", "lr=1"], "stages.*.optim.lr"),
        (["recipe=realtime", "stages.realtme.optim.lr=1"], "no stage 'realtme'"),
        (["recipe=realtime", "seed=abc"], "seed=abc"),
        (["recipe=realtime", "stages.realtime.optim.betas=[1"], "stages.realtime.optim.betas"),
        (["recipe=realtime", "stages.realtime.data.global_batch_size=0"], "stages.realtime.data.global_batch_size=0"),
        (["recipe=realtime", "stages.realtime.objective.weights.silence=1"], "idle_silence"),
        (["recipe=realtime", "stages.realtime.objective=moss_v"], "did you mean moss_vl"),
        (["recipe=realtime", "stages.realtme.objective=moss_vl"], "no stage 'realtme'"),
        (["recipe=realtime", "stages.realtime.objective=dispider"], "model.decision_head=true"),
        (["recipe=realtime", "stages.realtime.objective.margin=-1"], "stages.realtime.objective.margin=-1"),
        (["recipe=realtime", "evaluate.decode.decide_by=head"], "model.decision_head=true"),
        (["recipe=realtime", "evaluate.decode.head_threshold=0.3"], "evaluate.decode.head_threshold=0.3"),
        (["recipe=realtime", "stages.realtime.steps=0"], "stages.realtime.steps=0"),
        (["recipe=realtime", "stages.realtime.steps=null", "stages.realtime.epochs=null"], "both are null"),
        (["recipe=realtime", "stages.realtime.compiler.sinks=2"], "window"),
        (["recipe=pipeline", "stages.sft.order=1"], "same order"),
        (["recipe=realtime", "tracking.wandb=yes"], "tracking.wandb"),
        (["recipe=realtime", "resume=maybe"], "resume"),
        (["recipe=realtime", "layout.cp=2"], "layout.cp"),
        (["recipe=realtime", "model.vision.patch_size=13"], "model.vision.image_size"),
        (["recipe=realtime", "recipes=nowhere"], "no such folder"),
        (["recipe=realtime", "model.text.rope_scaling=4"], "model.text.rope_scaling=4"),
        (["recipe=realtime", "model.text.rope_scaling.factor=x"], "model.text.rope_scaling.factor=x"),
        (["recipe"], "key=value"),
    ],
)
def test_mistakes_name_the_field(overrides, expected):
    with pytest.raises(ConfigError) as error:
        compose_run(overrides)
    assert expected in str(error.value)


def test_a_decision_head_that_is_asked_for_must_be_trained():
    head = ["model.decision_head=true", "stages.*.objective=dispider"]
    for recipe in ("quickstart", "pipeline"):  # earlier stages of `pipeline` do not train it
        assert compose_run([f"recipe={recipe}", *head]).stages["realtime"].objective.decision_head_weight == 1.0
    with pytest.raises(ConfigError, match=r"realtime.objective.decision_head_weight=1.0: stages.realtime.trainable=\["):
        compose_run(["recipe=quickstart", *head, "stages.realtime.trainable=[head, cross_layers]"])
    frozen = compose_run(["recipe=quickstart", head[0], "stages.realtime.trainable=[head]"])  # a trained one may rest
    assert frozen.stages["realtime"].objective.decision_head_weight is None
