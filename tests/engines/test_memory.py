"""Live tensor bytes on cases whose answer is known."""

import functools
import gc
import math
import mmap

import pytest
import torch
from engine_parts import global_batches, setup_engine, tiny_model
from torch.utils.checkpoint import checkpoint

from moss_train.engines.config import OptimConfig
from moss_train.engines.megatron import MegatronEngine
from moss_train.engines.memory import ActivationMemory, LiveTensors, ResidentSet, measure_step

KB = 1024


def kilobytes(count: float) -> torch.Tensor:
    return torch.zeros(int(count * KB), dtype=torch.uint8)


@pytest.fixture(autouse=True)
def no_garbage():
    """Nothing of an earlier test is freed amid this one's sums."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def added(step) -> tuple[int, int]:
    """Bytes that `step` added at most, and that its result keeps."""
    with LiveTensors() as live:
        before = live.current
        result = step()
        kept = live.current - before
        peak = live.peak - before
    del result
    return peak, kept


def test_what_is_kept_and_what_was_freed():
    def step():
        first = kilobytes(3)
        del first
        second = kilobytes(2)
        third = kilobytes(1)
        del second
        return third, kilobytes(0.5)

    assert added(step) == (3 * KB, 1.5 * KB)


def test_a_result_lives_beside_its_operands():
    assert added(lambda: kilobytes(1) + kilobytes(1)) == (3 * KB, 1 * KB)


def test_views_and_in_place_operators_are_free():
    def step():
        x = kilobytes(4)
        return x.view(2, -1)[1:].transpose(0, 1), x.add_(1), x.detach(), x[::2].unsqueeze(0).expand(5, -1)

    assert added(step) == (4 * KB, 4 * KB)


def test_one_view_keeps_the_whole_storage():
    assert added(lambda: kilobytes(4)[:1]) == (4 * KB, 4 * KB)


def test_a_loop_does_not_add_up():
    def step():
        x = kilobytes(1)
        for _ in range(50):
            x = x + 1
        return x

    assert added(step) == (2 * KB, 1 * KB)


def test_resized_storages_count_what_they_hold_now():
    def step():
        x = kilobytes(4)
        x.untyped_storage().resize_(0)
        y = kilobytes(1)
        y.resize_(2 * KB)
        return x, y

    assert added(step) == (4 * KB, 2 * KB)


def test_what_existed_before_is_not_what_a_step_adds_but_can_be_freed():
    old = [kilobytes(8)]
    with LiveTensors() as live:
        before = live.current
        assert before >= 8 * KB
        old.clear()
        assert live.current == before - 8 * KB
        new = kilobytes(3)
        assert live.current == before - 5 * KB
    assert live.peak == before
    del new


def test_gradients_that_only_the_parameter_holds_exist_before():
    weight = torch.zeros(KB, requires_grad=True)
    weight.sum().backward()
    with LiveTensors() as live:
        before = live.current
        weight.grad = None
        assert live.current == before - 4 * KB


def test_tensors_from_outside_count_once_they_are_used():
    array = kilobytes(4).numpy()
    with LiveTensors() as live:
        before = live.current
        x = torch.from_numpy(array)
        y = x + 0
        assert live.current == before + 8 * KB
    del x, y


def test_meta_tensors_take_nothing():
    assert added(lambda: torch.zeros(10 * KB, device="meta") + 1) == (0, 0)


def test_backward_passes_are_seen():
    """y = sum(exp(x)): the exponential (kept for the backward pass), then its gradient, then that of x."""
    x = torch.zeros(256, requires_grad=True)  # 1 KB

    def step():
        y = x.exp().exp()
        y.sum().backward()

    peak, kept = added(step)
    assert kept == KB  # x.grad
    # Both exponentials, the gradient of the outer one (an expanded scalar is free) and what it is multiplied to.
    assert 3 * KB <= peak <= 4 * KB + 64


def chain(x: torch.Tensor) -> torch.Tensor:
    for _ in range(16):
        x = x.exp()
    return x


def test_activations_are_what_the_forward_pass_left():
    x = torch.full((256,), -1.0, requires_grad=True)
    _, kept = measure_step(lambda: chain(x).sum().backward())
    assert 16 * KB <= kept.activations <= 16 * KB + 64
    assert kept.peak - kept.before >= kept.activations
    x.grad = None
    _, recomputed = measure_step(lambda: checkpoint(chain, x, use_reentrant=True).sum().backward())
    assert recomputed.activations < KB  # the sum alone: nothing of the chain
    assert recomputed.added >= 16 * KB  # the recomputation happens within the backward pass, and is seen
    x.grad = None
    _, forward_only = measure_step(lambda: chain(x).sum())
    assert forward_only.activations == 0


def test_activations_of_several_microbatches_are_the_most_that_waited():
    x = torch.full((256,), -1.0, requires_grad=True)
    x.grad = torch.zeros_like(x)

    def two_waiting():
        first, second = chain(x).sum(), chain(x).sum()
        first.backward()
        second.backward()

    with LiveTensors() as live, ActivationMemory(live) as activations:
        two_waiting()
    assert 32 * KB <= activations.bytes <= 32 * KB + 64


def test_the_autograd_engine_is_put_back_also_after_an_error():
    engine = torch.autograd.Variable._execution_engine
    resize = torch.UntypedStorage.resize_
    with pytest.raises(ZeroDivisionError):
        measure_step(lambda: 1 / 0)
    assert torch.autograd.Variable._execution_engine is engine
    assert torch.UntypedStorage.resize_ is resize
    kilobytes(1) + 1  # no mode left behind that would raise


def test_a_measured_step_is_bit_identical(one_process):
    """Three optimizer steps, the second one measured or not."""
    weights = []
    for measured in (False, True):
        engine = setup_engine(MegatronEngine(), tiny_model(), OptimConfig(lr=1e-2))
        for number, microbatches in enumerate(global_batches(3)):
            step = functools.partial(engine.train_step, microbatches)
            if measured and number == 1:
                output, figures = measure_step(step)
            else:
                output = step()
        weights.append((output.loss, {name: t.clone() for name, t in engine.state_dict().tensors.items()}))
    (plain_loss, plain), (loss, measured_weights) = weights
    assert loss == plain_loss and math.isfinite(loss)
    for name, tensor in plain.items():
        assert torch.equal(tensor, measured_weights[name]), name
    parameters = sum(tensor.nbytes for name, tensor in plain.items() if name.startswith("model/"))
    assert figures.before >= 4 * parameters  # weights, gradients, two moments
    assert 0 < figures.activations < figures.added
    assert figures.rss > figures.peak


def test_the_resident_set_is_the_step_s_own():
    # Pages of its own, given back when closed: a tensor may lie in what the allocator still holds from earlier tests.
    with ResidentSet() as large, mmap.mmap(-1, 32 * 1024 * KB) as buffer:
        buffer.write(b"\x01" * len(buffer))
    with ResidentSet() as small:
        pass
    assert large.peak - small.peak > 16 * 1024 * KB
