"""Rooms import only rooms to their left (design §3), inside functions too."""

import ast
from pathlib import Path

import pytest

import moss_train

PACKAGE = Path(moss_train.__file__).parent
ORDER = [
    {"streams"}, {"parallel"}, {"data"}, {"synthesis"}, {"model"}, {"objectives"}, {"engines"}, {"checkpoint"},
    {"evaluate", "report"}, {"train"}, {"bench"}, {"cli", "doctor"},
]  # fmt: skip
PLACE = {room: place for place, rooms in enumerate(ORDER) for room in rooms}
#: whoever has no room is a tool of all, and imports none of them
TOOLS = {"errors", "exit_codes", "locations", "redact", "cli_options"}
MEGATRON = {"parallel", "model", "engines"}


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_only_to_the_left(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imports(path):
        # Energon shares megatron-core's name, not its code.
        if name.split(".")[0] == "megatron" and not name.startswith("megatron.energon"):
            assert room in MEGATRON, f"{name}: only {sorted(MEGATRON)} import megatron"
        if not name.startswith("moss_train.") or room in ("__init__", "__main__"):
            continue
        other = name.split(".")[1]
        if other in TOOLS or other == "__version__" or other == room:
            continue
        assert room not in TOOLS, f"a tool of all imports {name}"
        assert PLACE[other] <= PLACE[room], f"{room} imports {name}"
