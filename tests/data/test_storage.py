"""Shards by URL: whole, checked, tried again, kept within a limit, and no secret in what is said about them."""

import errno
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from faulty_server import FaultyServer, faulty_server

from moss_train.data.config import DataConfig
from moss_train.data.shards import storage
from moss_train.data.shards.storage import ShardStore, expand, is_remote, join, shown
from moss_train.errors import ConfigError, DataError

MB = 1_000_000


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with faulty_server() as server:
        yield server


class Waits(list):
    """Stands for the sleep between two tries: notes the seconds."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def store_in(folder: Path, **settings) -> tuple[ShardStore, Waits]:
    waits = Waits()
    return ShardStore(str(folder / "cache"), **({"sleep": waits, "timeout_s": 20.0} | settings)), waits


def files_of(folder: Path) -> list[str]:
    """Names of the shards in the cache, without their digests."""
    names = [path.name.partition("-")[2] for path in (folder / "cache").iterdir() if path.name != ".lock"]
    return sorted(name for name in names if not name.endswith(".json"))


def test_local_paths_are_used_as_they_are(tmp_path: Path):
    (tmp_path / "a.tar").write_bytes(b"0123456789")
    store, _ = store_in(tmp_path)
    assert store.local(str(tmp_path / "a.tar")) == tmp_path / "a.tar"
    assert store.read(str(tmp_path / "a.tar"), 3, 4) == b"3456"
    with pytest.raises(DataError, match="a.tar is cut short"):
        store.read(str(tmp_path / "a.tar"), 8, 4)
    store.prefetch(str(tmp_path / "a.tar"))
    assert not (tmp_path / "cache").exists()


def test_a_shard_is_fetched_once(tmp_path: Path, server: FaultyServer):
    server.files["/d/a.tar"] = data = noise(3 * MB)
    store, _ = store_in(tmp_path)
    url = f"{server.url}/d/a.tar"
    path = store.local(url, len(data))
    assert path.read_bytes() == data and path.name.endswith("-a.tar")
    assert store.read(url, 1000, 50, len(data)) == data[1000:1050]
    assert store.local(url) == path  # of unknown size, but this store has fetched it
    assert store_in(tmp_path)[0].local(url, len(data)) == path  # a later run
    assert len(server.requests) == 1


def test_a_copy_of_unknown_size_is_compared_with_the_original_once_per_store(tmp_path: Path, server: FaultyServer):
    url = f"{server.url}/index.arrow"
    for content, sent in ((b"one", 3), (b"one", 3), (b"other", 8)):
        server.files["/index.arrow"] = content
        store, _ = store_in(tmp_path)
        assert store.local(url).read_bytes() == content
        assert store.local(url).read_bytes() == content
        assert server.sent == sent
    assert len(server.requests) == 3
    assert [request.condition is not None for request in server.requests] == [False, True, True]


@pytest.mark.parametrize(
    ("fault", "sent"),
    [
        (500, 0),
        (503, 0),
        (429, 0),
        (("drop", 7 * MB), 7 * MB),
        (("drop", 0), 0),
        (("truncate", 7 * MB), 7 * MB),
        (("stall", 7 * MB), 7 * MB),
    ],
    ids=str,
)
def test_transfers_recover(tmp_path: Path, server: FaultyServer, fault, sent: int):
    server.files["/a.tar"] = data = noise(8 * MB)
    server.fail("/a.tar", fault)
    stalls = isinstance(fault, tuple) and fault[0] == "stall"
    store, waits = store_in(tmp_path, timeout_s=0.4 if stalls else 20.0)
    assert store.local(f"{server.url}/a.tar", len(data)).read_bytes() == data
    assert len(server.requests) == 2 and len(waits) == 1
    assert files_of(tmp_path) == ["a.tar"]
    if sent:  # it went on where it was; what the library held when the line broke comes again
        assert sent // 2 <= int(server.ranges()[1].removeprefix("bytes=")[:-1]) <= sent
    else:
        assert server.ranges()[1] is None


def test_tries_are_further_and_further_apart_and_then_end(tmp_path: Path, server: FaultyServer):
    server.files["/a.tar"] = noise(1000)
    server.fail("/a.tar", 503, ("drop", 10), 500, ("drop", 20), 503)
    store, waits = store_in(tmp_path, retries=4)
    with pytest.raises(DataError, match=r"/a\.tar cannot be fetched: 5 tries failed, the last: HTTP 503"):
        store.local(f"{server.url}/a.tar", 1000)
    assert [1 <= wait / step <= 1.25 for wait, step in zip(waits, (1, 2, 4, 8), strict=True)] == [True] * 4
    assert store.local(f"{server.url}/a.tar", 1000).read_bytes() == noise(1000)  # the server is well again


def test_a_slow_line_that_breaks_often_is_no_failure(tmp_path: Path, server: FaultyServer):
    """Each try brings much: more breaks than tries are granted."""
    server.files["/a.tar"] = data = noise(35 * MB)
    server.fail("/a.tar", *[("drop", 10 * MB)] * 3)
    store, waits = store_in(tmp_path, retries=1)
    assert store.local(f"{server.url}/a.tar", len(data)).read_bytes() == data
    assert server.sent < 2 * len(data) and len(waits) == 3


def test_parts_of_different_versions_are_never_joined(tmp_path: Path, server: FaultyServer):
    server.files["/a.tar"] = noise(2 * MB, seed=1)
    server.fail("/a.tar", ("drop", MB), 404)
    store, _ = store_in(tmp_path)
    with pytest.raises(DataError, match="404"):
        store.local(f"{server.url}/a.tar", 2 * MB)
    server.files["/a.tar"] = new = noise(2 * MB, seed=2)
    assert store.local(f"{server.url}/a.tar", 2 * MB).read_bytes() == new
    assert server.ranges()[2] is not None  # asked to go on, the server sent the new one from its start


@pytest.mark.parametrize("later", [noise(2 * MB), noise(MB // 2, 3)], ids=["ignores ranges", "is shorter now"])
def test_a_server_that_cannot_go_on_sends_the_whole(tmp_path: Path, server: FaultyServer, later: bytes):
    server.files["/a.tar"] = noise(2 * MB)
    server.fail("/a.tar", ("drop", MB), 503)
    store, _ = store_in(tmp_path, retries=1)
    with pytest.raises(DataError):
        store.local(f"{server.url}/a.tar")
    server.files["/a.tar"] = later
    if len(later) == 2 * MB:
        server.fail("/a.tar", "no-range")
    assert store.local(f"{server.url}/a.tar").read_bytes() == later


def test_what_no_later_try_mends_is_tried_once(tmp_path: Path, server: FaultyServer):
    server.files["/a.tar"] = noise(500)
    store, waits = store_in(tmp_path)
    with pytest.raises(DataError, match="nowhere.tar cannot be fetched: HTTP 404"):
        store.local(f"{server.url}/nowhere.tar")
    server.fail("/a.tar", 403)
    with pytest.raises(DataError, match="HTTP 403"):
        store.local(f"{server.url}/a.tar")
    with pytest.raises(DataError, match="has 500 bytes, not 499: index the source again"):
        store.local(f"{server.url}/a.tar", 499)
    with pytest.raises(DataError, match="a.tar has 0.000 GB, more than data.cache_gb=1e-07: raise that"):
        store_in(tmp_path, cache_gb=1e-7)[0].local(f"{server.url}/a.tar")
    assert waits == [] and files_of(tmp_path) == []


def test_a_refused_connection_and_an_unknown_scheme(tmp_path: Path):
    store, waits = store_in(tmp_path, retries=1)
    with pytest.raises(DataError, match=r"127\.0\.0\.1:1/a\.tar cannot be fetched: 2 tries failed.*onnect"):
        store.local("http://127.0.0.1:1/a.tar")
    with pytest.raises(ConfigError, match="fsspec cannot read nonsense://"):
        store.local("nonsense://bucket/a.tar")
    assert len(waits) == 1


SECRETS = ("hunter2", "hunter%402", "s3cr3tsig", "AKfakecred")


@pytest.mark.parametrize(
    "location",
    [
        "http://jane:hunter2@127.0.0.1:1/d/a.tar?X-Amz-Credential=AKfakecred&X-Amz-Signature=s3cr3tsig",
        "http://jane:hunter%402@127.0.0.1:1/d/a.tar?anything=s3cr3tsig",
        "pipe:cat --user jane:hunter2 'https://host/d/a.tar?sig=s3cr3tsig'",
        "pipe:echo 'https://u:hunter2@host/d/a.tar?k=s3cr3tsig' >&2; echo bad AKfakecred >&2; exit 3",
        "s3x://jane:hunter2@bucket/d/a.tar?sig=s3cr3tsig",
    ],
)
def test_no_secret_is_said_or_logged(tmp_path: Path, location: str, caplog):
    store, _ = store_in(tmp_path, retries=1)
    with caplog.at_level(logging.DEBUG, "moss_train"), pytest.raises((DataError, ConfigError)) as caught:
        store.local(location)
    said = f"{caught.value} {caplog.text} {shown(location)} {caught.value.__cause__} {os.listdir(tmp_path / 'cache')}"
    assert "a.tar" in str(caught.value)
    assert not [secret for secret in SECRETS if secret in said]


def test_user_and_password_reach_the_server_and_signatures_do_not_name_the_copy(tmp_path: Path, server: FaultyServer):
    server.files["/a.tar"] = noise(100)
    store, _ = store_in(tmp_path)
    address = server.url.replace("//", "//jane:hunter2@") + "/a.tar?part=7"
    first = store.local(f"{address}&X-Amz-Signature=one&X-Amz-Date=1", 100)
    assert server.requests[0].authorization.startswith("Basic ")
    assert "X-Amz-Signature=one" in server.requests[0].path
    assert store.local(f"{address}&X-Amz-Signature=two&X-Amz-Date=2", 100) == first
    assert len(server.requests) == 1
    assert store.local(address.replace("part=7", "part=8"), 100) != first


def test_object_stores_through_fsspec(tmp_path: Path, monkeypatch):
    memory = fsspec.filesystem("memory")
    data = noise(10 * MB)
    memory.pipe("/bucket/d/a.tar", data)
    memory.pipe("/bucket/d/b.tar", b"b")
    read, blocks = type(memory).cat_file, []

    def cat_file(self, path, start=None, end=None, **options):
        blocks.append(start)
        if len(blocks) == 3:
            raise ConnectionResetError("the line broke")
        return read(self, path, start=start, end=end, **options)

    monkeypatch.setattr(type(memory), "cat_file", cat_file)
    store, waits = store_in(tmp_path)
    assert expand("memory://bucket/d") == ["memory:///bucket/d/a.tar", "memory:///bucket/d/b.tar"]
    assert store.local("memory://bucket/d/a.tar", len(data)).read_bytes() == data
    step = 4 << 20
    assert blocks == [0, step, 2 * step, 2 * step] and len(waits) == 1  # went on where it broke
    assert store.local("memory://bucket/d/b.tar").read_bytes() == b"b"
    memory.pipe("/bucket/d/b.tar", b"new")
    assert store_in(tmp_path)[0].local("memory://bucket/d/b.tar").read_bytes() == b"new"
    with pytest.raises(DataError, match="no such file"):
        store.local("memory://bucket/d/c.tar")
    with pytest.raises(DataError, match="no file of a known size"):
        store.local("memory://bucket/d")
    memory.rm("/bucket", recursive=True)


def test_an_object_store_that_hangs(tmp_path: Path, monkeypatch):
    memory, hang = fsspec.filesystem("memory"), threading.Event()
    memory.pipe("/bucket/a.tar", b"x")
    monkeypatch.setattr(type(memory), "cat_file", lambda *a, **k: hang.wait() and b"x")
    with pytest.raises(DataError, match="2 tries failed, the last: no byte came for 0.1 s"):
        store_in(tmp_path, retries=1, timeout_s=0.1)[0].local("memory://bucket/a.tar")
    hang.set()
    memory.rm("/bucket", recursive=True)


def test_an_object_store_without_credentials_is_not_asked_again(tmp_path: Path, monkeypatch):
    class NoCredentialsError(Exception):
        """As botocore's: it has no base in common with others'."""

    def refuse(*_: object, **__: object) -> bytes:
        raise NoCredentialsError("Unable to locate credentials")

    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/a.tar", b"x")
    monkeypatch.setattr(type(memory), "cat_file", refuse)
    store, waits = store_in(tmp_path)
    with pytest.raises(DataError, match="cannot be fetched: Unable to locate credentials: set them"):
        store.local("memory://bucket/a.tar")
    assert waits == []
    memory.rm("/bucket", recursive=True)


def test_commands(tmp_path: Path):
    data = noise(3 * MB)
    (tmp_path / "a.tar").write_bytes(data)
    store, waits = store_in(tmp_path, retries=1)
    assert store.local(f"pipe:cat {tmp_path}/a.tar", len(data)).read_bytes() == data
    with pytest.raises(DataError, match="2 tries failed, the last: the command ended with code 1: .*No such file"):
        store.local(f"pipe:cat {tmp_path}/b.tar")
    with pytest.raises(DataError, match="2 tries failed, the last: it ended after 5 of 100 bytes"):
        store.local("pipe:printf 12345", 100)
    with pytest.raises(DataError, match="the last: more than its 3 bytes came"):
        store.local("pipe:printf 12345", 3)
    assert len(waits) == 3


def test_a_command_that_stalls_is_ended_with_all_that_it_started(tmp_path: Path):
    store, _ = store_in(tmp_path, retries=0, timeout_s=0.5)
    command = f"pipe:sh -c 'echo $$ > {tmp_path}/pid; exec sleep 600'; true"
    with pytest.raises(DataError, match="no byte came for 0.5 s"):
        store.local(command)
    stat = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
    deadline = time.monotonic() + 20
    while stat.exists() and stat.read_text().split()[2] not in "ZX":  # the kernel ends it when it gets to it
        assert time.monotonic() < deadline


def test_the_least_recently_used_go_first(tmp_path: Path, server: FaultyServer):
    for name in "abcd":
        server.files[f"/{name}.tar"] = noise(1000, ord(name))
    store, _ = store_in(tmp_path, cache_gb=3.5e-6)
    paths = {}
    for age, name in enumerate("abc"):
        paths[name] = store.local(f"{server.url}/{name}.tar", 1000)
        os.utime(paths[name], (age, age))
    store.local(f"{server.url}/a.tar", 1000)
    reader = paths["b"].open("rb")
    store.local(f"{server.url}/d.tar", 1000)
    assert files_of(tmp_path) == ["a.tar", "c.tar", "d.tar"]
    assert reader.read() == server.files["/b.tar"]  # whoever has it open goes on reading
    os.utime(paths["c"], (1, 1))
    with store.held(f"{server.url}/c.tar", 1000):
        os.utime(paths["c"], (1, 1))
        store.local(f"{server.url}/b.tar", 1000)
    assert files_of(tmp_path) == ["b.tar", "c.tar", "d.tar"]
    assert len(list((tmp_path / "cache").glob("*.json"))) == 3


def test_room_is_made_before_and_for_what_is_on_its_way(tmp_path: Path, server: FaultyServer):
    for name in "abc":
        server.files[f"/{name}.tar"] = noise(2 * MB, ord(name))
    store, _ = store_in(tmp_path, cache_gb=4.5e-3)
    store.local(f"{server.url}/a.tar", 2 * MB)
    server.fail("/b.tar", ("stall", MB))
    store.prefetch(f"{server.url}/b.tar", 2 * MB)
    assert server.stalled.wait(20)
    store.local(f"{server.url}/c.tar", 2 * MB)
    assert files_of(tmp_path) == ["b.tar.partial", "c.tar"]  # the partial file counts whole, and is not evicted
    store.close()
    assert files_of(tmp_path) == ["b.tar.partial", "c.tar"]
    store, _ = store_in(tmp_path, cache_gb=4.5e-3)
    store.local(f"{server.url}/b.tar", 2 * MB)
    assert server.ranges()[-1] is not None


def test_an_abandoned_partial_file_is_evicted(tmp_path: Path, server: FaultyServer):
    server.files["/a.tar"], server.files["/b.tar"] = noise(2 * MB), noise(2 * MB, 1)
    server.fail("/a.tar", ("drop", MB))
    store, _ = store_in(tmp_path, cache_gb=3e-3, retries=0)
    with pytest.raises(DataError):
        store.local(f"{server.url}/a.tar", 2 * MB)
    assert files_of(tmp_path) == ["a.tar.partial"]
    store.local(f"{server.url}/b.tar", 2 * MB)
    assert files_of(tmp_path) == ["b.tar"]
    assert len(list((tmp_path / "cache").glob("*.json"))) == 1


FETCH = """
import sys
from moss_train.data.shards.storage import ShardStore
path = ShardStore(sys.argv[1], timeout_s=20.0).local(sys.argv[2], int(sys.argv[3]))
print(path.stat().st_size)
"""


def test_processes_and_threads_fetch_a_shard_once(tmp_path: Path, server: FaultyServer):
    server.files["/a.tar"] = data = noise(2 * MB)
    server.gate = threading.Event()
    arguments = [sys.executable, "-c", FETCH, str(tmp_path / "cache"), f"{server.url}/a.tar", str(len(data))]
    processes = [subprocess.Popen(arguments, stdout=subprocess.PIPE) for _ in range(2)]
    store, _ = store_in(tmp_path)
    threads = [threading.Thread(target=store.local, args=(f"{server.url}/a.tar", len(data))) for _ in range(4)]
    for thread in threads:
        thread.start()
    server.gate.set()
    for thread in threads:
        thread.join()
    assert [process.communicate()[0] for process in processes] == [b"2000000\n"] * 2
    assert len(server.requests) == 1 and store.local(f"{server.url}/a.tar", len(data)).read_bytes() == data


def test_a_killed_process_leaves_what_it_has_fetched(tmp_path: Path, server: FaultyServer):
    server.files["/a.tar"] = data = noise(3 * MB)
    server.fail("/a.tar", ("stall", 2 * MB))
    arguments = [sys.executable, "-c", FETCH, str(tmp_path / "cache"), f"{server.url}/a.tar", str(len(data))]
    with subprocess.Popen(arguments) as process:
        assert server.stalled.wait(60)
        partial = next((tmp_path / "cache").glob("*.partial"))
        while partial.stat().st_size < 2 * MB:
            pass
        process.kill()
    store, waits = store_in(tmp_path)
    assert store.local(f"{server.url}/a.tar", len(data)).read_bytes() == data
    assert waits == [] and server.ranges() == [None, f"bytes={2 * MB}-"] and server.sent == len(data)


def test_prefetch_is_bounded_and_what_failed_is_tried_again(tmp_path: Path, server: FaultyServer):
    for number in range(9):
        server.files[f"/{number}.tar"] = noise(1000, number)
    server.files.pop("/7.tar")
    server.gate = threading.Event()
    store, _ = store_in(tmp_path)
    for number in range(9):
        for _ in range(2):
            store.prefetch(f"{server.url}/{number}.tar", 1000)
    server.gate.set()
    for number in (0, 1, 2, 3, 4, 5, 6, 8):
        assert store.local(f"{server.url}/{number}.tar", 1000).read_bytes() == noise(1000, number)
    with pytest.raises(DataError, match=r"/7\.tar cannot be fetched: HTTP 404"):
        store.local(f"{server.url}/7.tar", 1000)
    assert server.most_at_once <= storage.PREFETCH_TRANSFERS + 1  # one may be fetched by `local` itself
    assert len(server.requests) == 10, "the one that failed in the background was asked for again"
    server.files["/7.tar"] = noise(1000, 7)
    assert store.local(f"{server.url}/7.tar", 1000).read_bytes() == noise(1000, 7)
    store.close()
    store.close()


def test_closing_ends_a_stalled_transfer(tmp_path: Path, server: FaultyServer):
    server.files["/a.tar"] = noise(MB)
    server.fail("/a.tar", ("stall", 1000))
    store, _ = store_in(tmp_path, timeout_s=600.0)
    store.prefetch(f"{server.url}/a.tar", MB)
    assert server.stalled.wait(20)
    store.close()  # does not wait for the ten minutes
    with pytest.raises(DataError, match="closed"):
        store.local(f"{server.url}/a.tar", MB)


def test_a_full_disk_and_a_folder_that_cannot_be_written(tmp_path: Path, server: FaultyServer, monkeypatch):
    server.files["/a.tar"] = noise(1000)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    store, waits = store_in(tmp_path)
    monkeypatch.setattr(storage, "_write_all", full)
    with pytest.raises(DataError, match="no space is left in .*cache for .*a.tar: free some, lower data.cache_gb"):
        store.local(f"{server.url}/a.tar", 1000)
    assert waits == [] and files_of(tmp_path) == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be made.*set data.cache_dir"):
        ShardStore(str(tmp_path / "file" / "below")).local(f"{server.url}/a.tar")


def test_names_of_shards(tmp_path: Path, server: FaultyServer):
    for name in ("s-0.tar", "s-1.tar", "t.tar", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    here = str(tmp_path)
    assert expand(here) == [f"{here}/s-0.tar", f"{here}/s-1.tar", f"{here}/t.tar"]
    assert expand(f"{here}/s-{{0..1}}.tar") == expand(f"{here}/s-*.tar") == [f"{here}/s-0.tar", f"{here}/s-1.tar"]
    with pytest.raises(DataError, match="no shards there"):
        expand(f"{here}/none-*.tar")
    assert expand("pipe:cat x-{00..02}.tar") == [f"pipe:cat x-0{n}.tar" for n in range(3)]
    assert expand("https://host/x-{8..10}.tar?sig=1") == [f"https://host/x-{n}.tar?sig=1" for n in (8, 9, 10)]
    server.files["/d/"] = b'<a href="b.tar">b</a><a href="a.tar">a</a><a href="index.arrow">i</a>'
    assert expand(f"{server.url}/d/*.tar") == [f"{server.url}/d/a.tar", f"{server.url}/d/b.tar"]
    with pytest.raises(DataError, match="name the shards"):
        expand(f"{server.url}/e/*.tar")
    assert join("https://host/d?sig=1", "index.arrow") == "https://host/d/index.arrow?sig=1"
    assert join("s3://bucket/d/", "a.tar") == "s3://bucket/d/a.tar"
    assert join("/d", "a.tar") == "/d/a.tar" and join("/d", "s3://bucket/a.tar") == "s3://bucket/a.tar"
    with pytest.raises(DataError, match="holds no files"):
        join("pipe:cat x", "a.tar")
    assert is_remote("pipe:cat x") and is_remote("s3://bucket") and not is_remote("/data/d")


def test_the_store_of_a_recipe(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ShardStore.of(DataConfig()).cache.folder == tmp_path / "moss_train" / "shards"
    assert ShardStore.of(DataConfig(cache_dir=str(tmp_path / "x"))).cache.folder == tmp_path / "x"
