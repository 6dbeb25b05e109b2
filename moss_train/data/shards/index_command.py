"""`data index`: the shards of a source, wherever they lie, get their index."""

from dataclasses import dataclass

from moss_train.data.shards.index_build import build_index


@dataclass
class IndexOptions:
    """Options of `data index`."""

    path: str
    """Folder that holds `*.tar`; `index.arrow` is written beside them."""


def index_command(options: IndexOptions) -> int:
    """Scan the shards of a folder and write their index."""
    index = build_index(options.path, progress=True)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(index.totals.kinds.items()))
    print(f"indexed {len(index)} samples ({kinds}) in {len(index.shards)} shards: {index.path}")
    return 0
