"""How far 16-bit results may be from float32: as far as the plain computation in the same format is, with room.

A tolerance in numbers would have to be guessed for every shape. This one is not too tight for a correct kernel, which
rounds no more often than the plain computation, nor too loose: a wrong layout or a lost factor is off by as much as the
result is long.
"""

import torch

ROOM = 2.0  #: times the error of the plain computation
FLOOR = 1e-3  #: relative; below the rounding of bfloat16 (2**-9)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found - expected‖ / ‖expected‖ in float64."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm())


def assert_as_near(fused: dict[str, torch.Tensor], plain: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]):
    """Every tensor of `fused` is as near to `exact` as that of `plain` is, both in 16 bits, within ROOM and FLOOR."""
    assert fused.keys() == plain.keys() == exact.keys()
    for name, truth in exact.items():
        allowed = ROOM * relative_error(plain[name], truth) + FLOOR
        error = relative_error(fused[name], truth)
        assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"
