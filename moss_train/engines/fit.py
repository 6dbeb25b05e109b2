"""One list of everything that keeps a set of tensors from fitting a model."""

from collections.abc import Mapping

from moss_train.errors import CheckpointError

Shape = tuple[int, ...]


def require_fit(found: Mapping[str, Shape], expected: Mapping[str, Shape], what: str) -> None:
    """Raise CheckpointError naming every missing, unexpected and mis-shaped tensor at once, unless all fit.

    what: what holds the tensors, for the message.
    """
    missing = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in found]
    unexpected = [f"unexpected {name} {list(shape)}" for name, shape in found.items() if name not in expected]
    misshaped = [
        f"{name} has shape {list(found[name])}, the model needs {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if missing or unexpected or misshaped:
        raise CheckpointError(
            f"{what} does not fit the model: {len(missing)} tensors are missing, {len(unexpected)} unexpected, "
            f"{len(misshaped)} of another shape\n  " + "\n  ".join([*missing, *unexpected, *misshaped])
        )
