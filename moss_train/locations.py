"""Where the files that travel with the package stand: beside it in a source tree, inside it in a wheel."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def shipped_directory(name: str) -> Path:
    """The directory `recipes` or `data_specs` as shipped.

    Raises FileNotFoundError when the installation lacks it, which means that the package was built wrongly.
    """
    for candidate in (_PACKAGE / name, _PACKAGE.parent / name):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(f"{name}/ stands neither beside nor inside {_PACKAGE}; reinstall moss_train")


def source_tree() -> Path | None:
    """The root of the source tree this package runs from, or None when it runs from a wheel."""
    return _PACKAGE.parent if (_PACKAGE.parent / "pyproject.toml").is_file() else None
