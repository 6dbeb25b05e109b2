"""What was found in each shard, put together: one index file, in record batches of equal size."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from moss_train.data.shards.arrow_file import open_arrow, write_arrow
from moss_train.data.shards.index import BATCH_ROWS, write_index
from moss_train.data.shards.index_rows import ROWS, ContentDigest, IndexTotals, ShardFacts, planning_digest
from moss_train.data.shards.transfer import shown
from moss_train.errors import DataError

PARTIAL_SCHEMA = "moss_train/index-partial@1"


def write_partial(
    path: Path,
    shard: ShardFacts,
    batches: Sequence[pa.RecordBatch],
    digest: ContentDigest,
    totals: IndexTotals,
    settings: dict[str, Any],
) -> None:
    """Store what was found in one shard; `settings` are those under which it was looked at."""
    header = {
        "schema": PARTIAL_SCHEMA,
        "shard": vars(shard),
        "facts_digest": digest.facts,
        "totals": vars(totals),
        "settings": settings,
    }
    write_arrow(path, ROWS, batches, header)


def read_partial(path: Path) -> tuple[list[pa.RecordBatch], dict[str, Any]]:
    """What `write_partial` stored: rows (mapped) and header. Raises one of ARROW_ERRORS when there is none."""
    reader, header = open_arrow(path, ROWS, PARTIAL_SCHEMA)
    batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
    return batches, header


def merge_partials(
    partials: Sequence[Path],
    path: Path,
    tokenizer: dict[str, Any] | None,
    on_fault: Callable[[str, DataError], None] | None = None,
) -> None:
    """Write the index of all shards, `partials` in their order, to `path`.

    Raises DataError when a key occurs in two shards, or tells `on_fault` of it.
    """
    shards, totals, facts = [], IndexTotals(), []
    columns: dict[str, list[np.ndarray]] = {"key_hash": [], "kind": [], "modality": []}
    for partial in partials:
        batches, header = read_partial(partial)
        shards.append(ShardFacts(**header["shard"]))
        totals.add(IndexTotals(**header["totals"]))
        facts.append(header["facts_digest"])
        for batch in batches:
            columns["key_hash"].append(batch.column("key_hash").to_numpy().copy())
            columns["kind"].append(batch.column("kind").indices.to_numpy().copy())
            columns["modality"].append(batch.column("modality").indices.to_numpy().copy())
    numbers = np.repeat(np.arange(len(shards), dtype=np.int32), [shard.samples for shard in shards])
    hashes, kinds, modalities = (np.concatenate(part) if part else np.zeros(0) for part in columns.values())
    for name, error in _doubled_keys(hashes, numbers, partials, shards):
        if on_fault is None:
            raise error
        on_fault(name, error)
    planning = planning_digest(numbers, kinds, modalities)
    write_index(path, shards, _batches(partials), totals, facts, planning, tokenizer)


def _doubled_keys(
    hashes: np.ndarray, numbers: np.ndarray, partials: Sequence[Path], shards: Sequence[ShardFacts]
) -> Iterator[tuple[str, DataError]]:
    order = np.argsort(hashes, kind="stable")
    doubled = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    starts = np.searchsorted(numbers, np.arange(len(shards)))

    def key_of(sample: int) -> str:
        batches, _ = read_partial(partials[numbers[sample]])
        row = sample - starts[numbers[sample]]
        return pa.Table.from_batches(batches).column("key")[int(row)].as_py()

    for place in doubled.tolist():
        first, second = int(order[place]), int(order[place + 1])
        key = key_of(second)
        if key_of(first) == key:
            name = shards[numbers[second]].name
            yield name, DataError(f"{shown(name)}: key {key!r} is in {shown(shards[numbers[first]].name)} too")


def _batches(partials: Sequence[Path]) -> Iterator[pa.RecordBatch]:
    """All rows, `BATCH_ROWS` at a time, with the numbers of their shards."""
    waiting: list[pa.RecordBatch] = []
    rows = 0
    for number, partial in enumerate(partials):
        for batch in read_partial(partial)[0]:
            shard = pa.array(np.full(batch.num_rows, number, np.int32))
            waiting.append(batch.set_column(ROWS.get_field_index("shard"), ROWS.field("shard"), shard))
            rows += batch.num_rows
        while rows >= BATCH_ROWS:
            table = pa.Table.from_batches(waiting)
            yield from table.slice(0, BATCH_ROWS).combine_chunks().to_batches()
            waiting = table.slice(BATCH_ROWS).to_batches()
            rows -= BATCH_ROWS
    if rows:
        yield from pa.Table.from_batches(waiting).combine_chunks().to_batches()
