"""Training from a web server: the same batches as from a folder, whatever the transfers go through."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from data_samples import packed_streams
from faulty_server import FaultyServer, faulty_server
from loader_ranks import content, loader_of, steps_of

from moss_train.data.shards.storage import ShardStore
from moss_train.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """12 streams in shards of 4, and the lengths of their streams."""
    folder = packed_streams(tmp_path_factory.mktemp("remote"), 12, shard_samples=4)
    loader_of(folder).close()
    return folder


@pytest.fixture
def server(folder: Path, tmp_path: Path, monkeypatch) -> Iterator[FaultyServer]:
    """Serves the folder as /data; between two tries nobody waits."""

    def store_of(data) -> ShardStore:
        return ShardStore(
            str(tmp_path / "cache"), data.cache_gb, data.remote_retries, data.remote_timeout_s, lambda seconds: None
        )

    monkeypatch.setattr(ShardStore, "of", staticmethod(store_of))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    with faulty_server() as server:
        server.files = {f"/data/{path.name}": path.read_bytes() for path in folder.iterdir() if path.is_file()}
        yield server


def shard(server: FaultyServer, number: int) -> str:
    return sorted(name for name in server.files if name.endswith(".tar"))[number]


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_those_of_a_folder_and_shards_are_fetched_once(folder: Path, server: FaultyServer, workers: int):
    server.fail(shard(server, 0), ("drop", 3000), 503)
    server.fail(shard(server, 1), ("truncate", 2000))
    local = steps_of(loader_of(folder), 4)
    remote = steps_of(loader_of(f"{server.url}/data", workers=workers), 4)
    for here, there in zip(local, remote, strict=True):
        assert (here.keys, content(here)) == (there.keys, content(there)) and there.masked == 0
    asked = [request.path for request in server.requests]
    assert [asked.count(shard(server, number)) for number in range(3)] == [3, 2, 1], "once, and again after each fault"
    before = len(server.requests)
    with loader_of(f"{server.url}/data", workers=workers) as again:
        again.load_state_dict({**again.state_dict(), "epoch": 1, "step": 1})
        assert content(next(again)) == content(local[3])
    fetched = [request.path for request in server.requests[before:] if request.path.endswith(".tar")]
    assert fetched == [], "a second run finds the shards in the cache"


def test_a_small_cache_costs_transfers_and_nothing_else(folder: Path, server: FaultyServer):
    size = max(len(data) for name, data in server.files.items() if name.endswith(".tar"))
    local = steps_of(loader_of(folder), 4)
    remote = steps_of(loader_of(f"{server.url}/data", workers=1, cache_gb=2.2 * size / 1e9, frame_cache_mb=0), 4)
    assert [content(step) for step in remote] == [content(step) for step in local]


def test_a_server_that_stays_away_stops_the_run_with_its_name(server: FaultyServer, tmp_path: Path):
    loader = loader_of(f"{server.url}/data", workers=1, remote_retries=2)
    for path in (tmp_path / "cache").glob("*shard-000002.tar*"):
        path.unlink()
    server.fail(shard(server, 2), *[500] * 20)
    with loader, pytest.raises(DataError) as caught:
        for _ in range(2):
            next(loader)
    assert shard(server, 2).removeprefix("/data/") in str(caught.value) and "3" in str(caught.value)
