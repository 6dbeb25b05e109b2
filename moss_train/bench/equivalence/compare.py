"""How far a training is from its reference, and how far it may be.

Tolerances in fp32 are what rounding alone explains on these small models, with room; one wrong sum, one lost label or
one stale weight is orders of magnitude above them.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from moss_train.bench.equivalence.cases import Case
from moss_train.bench.equivalence.outcome import Outcome

Tensors = Mapping[str, torch.Tensor]

#: A tensor whose gradient is below this part of the whole gradient is held to this part of it.
FLOOR = 1e-4
#: The same in bfloat16, for gradients and for how far weights moved: what is small there is rounding alone.
HALF_FLOOR = 1e-2
#: A weight that hardly moved is not stored more exactly than this: two units in the last place of float32.
ULPS = 2.0**-22


@dataclass(frozen=True)
class Tolerance:
    """Largest deviation that counts as equal."""

    loss: float  #: relative, every step
    grad_norm: float  #: relative, every step
    gradient: float  #: of each tensor, ‖Δg‖ / max(‖g‖, FLOOR · ‖g of all‖)
    weight: float  #: of each tensor after one and after all steps, ‖Δw‖ / max(‖w − w₀‖, ULPS · ‖w‖ / weight)
    floor: float = FLOOR
    moved_floor: float = 0.0  #: a weight is held to at least this part of how far all of them moved


def tolerance(case: Case) -> Tolerance:
    """What `case` is held to."""
    if case.precision == "bf16":
        # Rounding to eight bits in one process alone, against the same weights in float32, gave up to 0.017, 0.08, 0.16
        # and 0.24 in 36 trainings. A gradient that is lost, doubled or not summed over two processes gives 0.5 or more.
        return Tolerance(3e-2, 1.5e-1, 3e-1, 4e-1, floor=HALF_FLOOR, moved_floor=HALF_FLOOR)
    return Tolerance(loss=1e-5, grad_norm=5e-5, gradient=5e-5, weight=1e-4 if case.problem.optimizer == "sgd" else 1e-3)


@dataclass
class Comparison:
    """The largest deviations found and everything that is not as it must be."""

    loss: float = 0.0
    grad_norm: float = 0.0
    gradient: float = 0.0
    weight: float = 0.0
    share_of_tolerance: float = 0.0  #: largest deviation as a part of what is allowed
    failures: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.failures

    def judge(self, figure: str, deviation: float, allowed: float, what: str) -> None:
        """Note one deviation. A NaN is no agreement."""
        for name, value in ((figure, deviation), ("share_of_tolerance", deviation / allowed)):
            setattr(self, name, worse(getattr(self, name), value))
        if not deviation <= allowed:
            self.failures.append(f"{what} deviates by {deviation:.3g}, more than {allowed:g}")


def worse(one: float, other: float) -> float:
    """The larger deviation; a NaN is larger than any."""
    return other if math.isnan(other) else max(one, other)


def compare(case: Case, found: Outcome, expected: Outcome) -> Comparison:
    """Every figure of every step and every tensor of every moment."""
    comparison, allowed = Comparison(), tolerance(case)
    _compare_names(comparison, found, expected)
    if not comparison.ok:
        return comparison
    _compare_exactly(comparison, case, found, expected)
    for number, (mine, theirs) in enumerate(zip(found.steps, expected.steps, strict=True)):
        comparison.judge("loss", _relative(mine.loss, theirs.loss), allowed.loss, f"loss of step {number}")
        norm = _relative(mine.grad_norm, theirs.grad_norm)
        comparison.judge("grad_norm", norm, allowed.grad_norm, f"gradient norm of step {number}")
        if mine.per_kind_count != theirs.per_kind_count:
            comparison.failures.append(
                f"step {number} trained {mine.per_kind_count} labels, not {theirs.per_kind_count}"
            )
        for kind, value in theirs.per_kind.items():
            deviation = _relative(mine.per_kind.get(kind, math.nan), value)
            comparison.judge("loss", deviation, allowed.loss, f"loss of {kind} in step {number}")
    gradients = gradient_deviations(found.tensors["gradient"], expected.tensors["gradient"], allowed.floor)
    for name, deviation in gradients.items():
        comparison.judge("gradient", deviation, allowed.gradient, f"gradient of {name}")
    for moment, steps in (("first", "one step"), ("last", "all steps")):
        deviations = weight_deviations(
            expected.tensors["start"], found.tensors[moment], expected.tensors[moment], allowed
        )
        for name in expected.trained:
            comparison.judge("weight", deviations[name], allowed.weight, f"{name} after {steps}")
    return comparison


def gradient_deviations(found: Tensors, expected: Tensors, floor: float = FLOOR) -> dict[str, float]:
    """‖Δg‖ / max(‖g‖, floor · ‖g of all‖) of each tensor."""
    whole = _norm(expected.values())
    return {
        name: _ratio(found[name] - gradient, max(_norm([gradient]), floor * whole))
        for name, gradient in expected.items()
    }


def weight_deviations(start: Tensors, found: Tensors, expected: Tensors, allowed: Tolerance) -> dict[str, float]:
    """‖Δw‖ / ‖w − w₀‖ of each tensor, with the floors of `Tolerance`."""
    moved = {name: weight.double() - start[name].double() for name, weight in expected.items()}
    least = allowed.moved_floor * _norm(moved.values())
    return {
        name: _ratio(
            found[name] - weight, max(_norm([moved[name]]), least, ULPS / allowed.weight * _norm([weight.double()]))
        )
        for name, weight in expected.items()
    }


def _norm(tensors: Iterable[torch.Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().norm()) ** 2 for tensor in tensors))


def _compare_names(comparison: Comparison, found: Outcome, expected: Outcome) -> None:
    for moment, tensors in expected.tensors.items():
        missing = sorted(set(tensors) - set(found.tensors[moment]))
        extra = sorted(set(found.tensors[moment]) - set(tensors))
        shapes = [
            n for n in tensors if n in found.tensors[moment] and found.tensors[moment][n].shape != tensors[n].shape
        ]
        for what, names in (("lacks", missing), ("has beyond the reference", extra), ("has other shapes of", shapes)):
            if names:
                comparison.failures.append(f"{moment}: {what} {', '.join(names[:4])} ({len(names)} in all)")
    if len(found.steps) != len(expected.steps):
        comparison.failures.append(f"{len(found.steps)} steps instead of {len(expected.steps)}")


def _compare_exactly(comparison: Comparison, case: Case, found: Outcome, expected: Outcome) -> None:
    """Fresh weights, loaded weights and frozen weights have no reason to differ by a bit."""
    for name, start in expected.tensors["start"].items():
        fresh = expected.tensors["fresh"][name]
        if case.precision == "bf16":
            fresh = fresh.bfloat16().float()
        if not torch.equal(found.tensors["fresh"][name], fresh):
            comparison.failures.append(f"{name}: the fresh weight is another")
        if not torch.equal(found.tensors["start"][name], start):
            comparison.failures.append(f"{name} is not what was loaded")
        if name not in expected.trained and not torch.equal(found.tensors["last"][name], start):
            comparison.failures.append(f"{name} is frozen, but was changed")


def _relative(found: float, expected: float) -> float:
    return abs(found - expected) / abs(expected) if expected else abs(found)


def _ratio(difference: torch.Tensor, size: float) -> float:
    norm = float(difference.double().norm())
    return norm / size if size else norm
