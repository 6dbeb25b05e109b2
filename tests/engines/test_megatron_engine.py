"""The megatron engine on the real model in one process: equal to plain torch, exact on resume, safe on bad numbers."""

import pytest
from engine_parts import PlainTraining, batch, global_batches, setup_engine, tiny_model

# isort: split
import torch

from moss_train.engines import EngineConfig, build_engine
from moss_train.engines.config import OptimConfig
from moss_train.engines.megatron import MegatronEngine
from moss_train.engines.pieces import MemorySource
from moss_train.engines.protocol import EngineState
from moss_train.errors import CheckpointError, ConfigError
from moss_train.model.groups import GROUPS, parameter_groups, trainable_names
from moss_train.objectives.config import DEFAULT_WEIGHTS, ObjectiveConfig
from moss_train.streams.compiled import IGNORED_LABEL

pytestmark = pytest.mark.usefixtures("one_process")

OPTIM = OptimConfig(
    lr=1e-2, group_lr={"vision_tower": 3e-3, "projector": 2e-2}, weight_decay=0.1, clip=1.0, warmup_fraction=0.4
)
STEADY = OptimConfig(lr=1e-2, weight_decay=0.1, warmup_steps=0, schedule="constant")


def engine_of(optim: OptimConfig = OPTIM, seed: int = 0, **options) -> MegatronEngine:
    return setup_engine(build_engine(EngineConfig()), tiny_model(seed), optim, **options)


def clone(state: EngineState) -> EngineState:
    return EngineState({name: tensor.clone() for name, tensor in state.tensors.items()}, dict(state.metadata))


def assert_identical(left: EngineState, right: EngineState) -> None:
    assert left.metadata == right.metadata
    assert left.tensors.keys() == right.tensors.keys()
    different = [name for name in left.tensors if not torch.equal(left.tensors[name], right.tensors[name])]
    assert not different


def gradients(engine: MegatronEngine) -> dict[str, torch.Tensor]:
    return {name: parameter.main_grad.clone() for name, parameter in engine._trained.items()}


def test_five_steps_equal_plain_adamw():
    engine, plain = engine_of(), PlainTraining(OPTIM)
    factors = [0.5, 1.0, 1.0, 2 / 3, 1 / 3]
    for microbatches, factor in zip(global_batches(5), factors, strict=True):
        output = engine.train_step(microbatches)
        loss, norm = plain.step(microbatches, factor)
        assert output.loss == pytest.approx(loss, rel=1e-6)
        assert output.grad_norm == pytest.approx(norm, rel=1e-5)
        assert output.lr["projector"] == pytest.approx(2e-2 * factor)
        assert output.lr["head"] == pytest.approx(1e-2 * factor)
        assert not output.skipped
    reference = dict(plain.model.named_parameters())
    for name, parameter in engine._trained.items():
        torch.testing.assert_close(parameter, reference[name], rtol=0, atol=2e-6, msg=name)


def test_the_gradient_norm_that_was_clipped_is_the_unclipped_one():
    microbatches = global_batches(1)[0]
    clipped = engine_of(OptimConfig(lr=1e-2, clip=1e-3)).train_step(microbatches)
    free = engine_of(OptimConfig(lr=1e-2, clip=0.0)).train_step(microbatches)
    assert clipped.grad_norm == free.grad_norm > 0.1


def test_one_microbatch_or_four_give_the_same_gradient():
    whole = batch(7, rows=4)
    parts = [
        type(whole)(
            **vars(whole)
            | {name: value[row : row + 1] for name, value in vars(whole).items() if name.endswith(("_RT", "_R", "_RF"))}
            | {
                "frames_NCHW": whole.frames_NCHW[whole.frame_rows_N == row],
                "frame_rows_N": torch.zeros(3, dtype=torch.int64),
                "frame_slots_N": torch.arange(3),
            }
        )
        for row in range(4)
    ]
    optim = OptimConfig(lr=0.0, clip=0.0)
    together, apart = engine_of(optim), engine_of(optim)
    one, four = together.train_step([whole]), apart.train_step(parts)
    assert four.loss == pytest.approx(one.loss, rel=1e-6)
    assert four.per_kind_count == one.per_kind_count
    assert four.decisions == one.decisions
    expected = gradients(together)
    for name, gradient in gradients(apart).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_frozen_parameters_stay_and_have_no_optimizer_state():
    model = tiny_model()
    trainable = trainable_names(model, "projector_xattn")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    engine = setup_engine(build_engine(EngineConfig()), model, OptimConfig(lr=1e-2), trainable=trainable)
    outputs = [engine.train_step(microbatches) for microbatches in global_batches(2)]
    assert set(outputs[0].lr) == {"projector", "cross_layers"}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in trainable)
        assert torch.equal(parameter, before[name]) == (name not in trainable), name
        assert (f"optimizer/{name}/exp_avg" in engine.state_dict().tensors) == (name in trainable)


def test_rate_zero_is_not_frozen():
    engine = engine_of(OptimConfig(lr=1e-2, group_lr={"projector": 0.0}, weight_decay=0.1))
    before = clone(engine.state_dict())
    output = engine.train_step(global_batches(1)[0])
    after = engine.state_dict()
    assert output.lr["projector"] == 0.0
    assert torch.equal(after.tensors["model/projector.weight"], before.tensors["model/projector.weight"])
    assert after.tensors["optimizer/projector.weight/exp_avg"].abs().sum() > 0


def test_norms_biases_and_gates_do_not_decay():
    """Without labels there is no gradient, so all that moves a weight is its decay."""
    engine = engine_of(STEADY)
    before = clone(engine.state_dict())
    silent = batch(1)
    silent.labels_RT.fill_(IGNORED_LABEL)
    engine.train_step([silent])
    for name, parameter in engine._trained.items():
        old = before.tensors[f"model/{name}"]
        expected = old * (1 - 1e-2 * 0.1) if parameter.dim() > 1 else old
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=0, msg=name)


def test_a_step_without_any_label_is_zero_and_is_not_skipped():
    silent = batch(1)
    silent.labels_RT.fill_(IGNORED_LABEL)
    output = engine_of(STEADY).train_step([silent, silent])
    assert (output.loss, output.grad_norm, output.labels, output.skipped) == (0.0, 0.0, 0, False)


def test_a_step_that_is_not_finite_leaves_no_trace_but_its_count():
    poisoned = batch(50)
    poisoned.weights_RT[0, :] = float("inf")
    first, second = global_batches(2)
    engine, clean = engine_of(STEADY), engine_of(STEADY)
    engine.train_step(first)
    clean.train_step(first)
    output = engine.train_step([second[0], poisoned])
    assert output.skipped and engine.skipped_steps == 1 and engine.step == 2
    engine.train_step(second)
    clean.train_step(second)
    mended, reference = engine.state_dict(), clean.state_dict()
    assert (mended.metadata["step"], mended.metadata["skipped_steps"]) == (3, 1)
    assert_identical(EngineState(mended.tensors, {}), EngineState(reference.tensors, {}))


def test_a_gradient_that_is_not_finite_is_caught_though_the_loss_is():
    engine = engine_of(STEADY)
    before = clone(engine.state_dict())
    poison = engine._trained["final_norm.weight"].register_hook(lambda gradient: gradient * float("nan"))
    output = engine.train_step(global_batches(1)[0])
    poison.remove()
    assert output.skipped and output.loss > 0
    assert_identical(EngineState(engine.state_dict().tensors, {}), EngineState(before.tensors, {}))


def test_three_steps_and_two_after_a_restore_are_five_steps_bit_for_bit():
    batches = global_batches(5)
    through, early, late = engine_of(), engine_of(), engine_of(seed=99)
    straight = [through.train_step(microbatches) for microbatches in batches]
    for microbatches in batches[:3]:
        early.train_step(microbatches)
    state = clone(early.state_dict())
    late.train_step(batches[4])  # a restore must undo whatever was there
    late.load(MemorySource(state.tensors), state.metadata)
    resumed = [late.train_step(microbatches) for microbatches in batches[3:]]
    assert resumed == straight[3:]
    assert_identical(late.state_dict(), through.state_dict())


def test_a_state_exists_before_the_first_step():
    engine, other = engine_of(), engine_of(seed=5)
    state = clone(engine.state_dict())
    other.load(MemorySource(state.tensors), state.metadata)
    microbatches = global_batches(1)[0]
    assert other.train_step(microbatches) == engine.train_step(microbatches)


def test_expected_shapes_describe_the_state():
    engine = engine_of()
    shapes = {name: tuple(tensor.shape) for name, tensor in engine.state_dict().tensors.items()}
    assert engine.expected_shapes() == shapes
    assert {name.split("/")[0] for name in engine.expected_shapes(optimizer=False)} == {"model"}
    parameters = dict(engine._model.named_parameters())
    assert set(shapes) >= {f"model/{name}" for name in parameters}
    assert not [name for name in shapes if "extra_state" in name]


def test_a_state_that_does_not_fit_is_refused_with_every_offender():
    engine = engine_of()
    state = clone(engine.state_dict())
    del state.tensors["model/projector.bias"]
    state.tensors["model/head.weight"] = torch.zeros(3, 3)
    state.tensors["optimizer/ghost/exp_avg"] = torch.zeros(1)
    before = clone(engine.state_dict())
    with pytest.raises(CheckpointError) as refusal:
        engine.load(MemorySource(state.tensors), state.metadata)
    for name in ("missing model/projector.bias", "unexpected optimizer/ghost/exp_avg", "model/head.weight has shape"):
        assert name in str(refusal.value)
    assert_identical(engine.state_dict(), before)


def test_weights_alone_keep_optimizer_and_step():
    engine, other = engine_of(), engine_of(seed=5)
    engine.train_step(global_batches(1)[0])
    wanted = other.state_dict().tensors
    engine.load_weights(MemorySource(wanted))
    tensors = engine.state_dict().tensors
    assert engine.step == 1
    assert all(torch.equal(tensors[name], wanted[name]) for name in engine.expected_shapes(optimizer=False))
    assert tensors["optimizer/head.weight/exp_avg"].abs().sum() > 0


def test_evaluation_gives_the_training_loss_and_changes_nothing():
    engine = engine_of()
    microbatches = global_batches(1)[0]
    before = clone(engine.state_dict())
    evaluated = engine.eval_step(microbatches)
    assert_identical(engine.state_dict(), before)
    trained = engine.train_step(microbatches)
    assert evaluated.loss == trained.loss
    assert evaluated.per_kind == trained.per_kind
    assert sum(trained.per_kind_share.values()) == pytest.approx(1.0)


def test_no_microbatch_is_an_error():
    with pytest.raises(ValueError, match="at least one microbatch"):
        engine_of().train_step([])


@pytest.mark.parametrize(
    ("trainable", "group_lr", "message"),
    [
        ({"head.weight", "head.wieght"}, {}, r"no parameter head\.wieght"),
        (set(), {}, "no parameter is left to train"),
        ({"head.weight"}, {"heads": 1e-3}, r"optim\.group_lr\.heads"),
        ({"head.weight"}, {"projector": 1e-3}, "projector.*not trained"),
    ],
)
def test_a_set_up_that_cannot_be_is_refused(trainable, group_lr, message):
    with pytest.raises(ConfigError, match=message):
        engine_of(OptimConfig(group_lr=group_lr), trainable=trainable)


def test_an_unknown_engine_is_refused_with_the_legal_ones():
    with pytest.raises(ConfigError, match=r"engine\.name='megatorn'.*megatron"):
        build_engine(EngineConfig(name="megatorn"))


def test_the_objective_is_the_configured_one():
    """Weight 0 everywhere but text: only text contributes to the loss, whatever the engine does around it."""
    only_text = ObjectiveConfig(weights={name: float(name == "text") for name in DEFAULT_WEIGHTS})
    output = engine_of(objective=only_text).train_step(global_batches(1)[0])
    assert output.per_kind_share["text"] == pytest.approx(1.0)
    assert output.per_kind["onset"] > 0


def test_groups_of_the_tiny_model_are_all_groups():
    """The tests above would prove less if the tiny model lacked a group."""
    assert set(parameter_groups(tiny_model()).values()) == set(GROUPS)
