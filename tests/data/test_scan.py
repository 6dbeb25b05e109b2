"""Headers of tars: read as tarfile and webdataset read them, and nothing believed that a hostile one claims."""

import io
import resource
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moss_train.data.shards.index_build import build_index
from moss_train.data.shards.scan import LONGEST_HEADER, scan_shard
from moss_train.errors import DataError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
NAMES = st.text("abcdefgh_-äÖ漢 ", min_size=1, max_size=60)


def write_tar(path: Path, entries: list[tuple[tarfile.TarInfo, bytes]], form: int = tarfile.USTAR_FORMAT) -> None:
    with tarfile.open(path, "w", format=form) as tar:
        for entry, data in entries:
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def header(name: str = "a.json", size: int = 0, kind: bytes = b"0", **fields: object) -> bytes:
    """One header block; `size` need not be true."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.type = size, kind
    for field, value in fields.items():
        setattr(entry, field, value)
    return entry.tobuf(tarfile.GNU_FORMAT)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    form=st.sampled_from(sorted(FORMATS)),
    folders=st.lists(NAMES, max_size=3),
    keys=st.lists(NAMES, min_size=1, max_size=5, unique=True),
    sizes=st.lists(st.integers(0, 1500), min_size=5, max_size=5),
)
def test_members_lie_where_tarfile_says(
    tmp_path: Path, form: str, folders: list[str], keys: list[str], sizes: list[int]
):
    path = tmp_path / "x.tar"
    entries = []
    for key, size in zip(keys, sizes, strict=False):
        for extension in ("json", "0.mp4"):
            name = "/".join([*folders, f"{key}.{extension}"])
            if len(name.encode()) > 90 and form == "ustar":
                name = f"{key[:8]}{len(entries)}.{extension}"
            entries.append((tarfile.TarInfo(name), bytes([len(entries)]) * size))
    write_tar(path, entries, FORMATS[form])
    found = {f"{key}.{name}": place for key, members in scan_shard(path) for name, place in members.items()}
    with tarfile.open(path) as tar:
        assert found == {entry.name: (entry.offset_data, entry.size) for entry in tar}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=st.lists(st.integers(0, 6 * 512 - 1), min_size=1, max_size=4), value=st.integers(0, 255))
def test_damaged_headers_are_an_error_or_still_inside_the_file(tmp_path: Path, places: list[int], value: int):
    path = tmp_path / "x.tar"
    write_tar(path, [(tarfile.TarInfo("a.json"), b"{}"), (tarfile.TarInfo("a.mp4"), b"x" * 600)])
    data = bytearray(path.read_bytes())
    for place in places:
        data[place] = value
    path.write_bytes(data)
    try:
        for _, members in scan_shard(path):
            assert all(0 <= offset <= offset + size <= len(data) for offset, size in members.values())
    except DataError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (header(size=8**11 - 1), "member 'a.json' ends after the file"),
        (header(size=2**62), "member 'a.json' ends after the file"),
        (header("././@LongLink", 2**40, b"L"), "a header of 1099511627776 bytes"),
        (header("././@PaxHeader", 2**40, b"x"), "a header of 1099511627776 bytes"),
        (header("././@PaxHeader", LONGEST_HEADER, b"g"), "a header ends after the file"),
        (header(kind=b"S"), "'a.json' is no plain file"),
        (header(kind=b"2", linkname="/etc/passwd"), "'a.json' is no plain file"),
        (header(kind=b"1", linkname="a.mp4"), "'a.json' is no plain file"),
        (header(kind=b"3"), "'a.json' is no plain file"),
        (header(kind=b"6"), "'a.json' is no plain file"),
        (header("../a.json"), "'../a.json' is no plain file"),
        (header("/a.json"), "'/a.json' is no plain file"),
        (header("x/../../a.json"), "'x/../../a.json' is no plain file"),
        (header("noextension"), "not named key.extension"),
        (header(".json"), "not named key.extension"),
        (header()[:156] + b"9" + header()[157:], "wrong checksum"),
        (b"\x1f\x8b" + header(), "no readable tar"),
        (b"", "is empty"),
    ],
)
def test_hostile_headers_are_refused_by_shard_and_member(tmp_path: Path, block: bytes, expected: str):
    path = tmp_path / "x.tar"
    path.write_bytes(block + bytes(1024 if block else 0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=expected) as caught:
        list(scan_shard(path))
    assert str(path) in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        (b"20 path=../up.json\n\n", "malformed|no plain file"),
        (b"19 path=../up.json\n", "no plain file"),
        (b"20 size=99999999999\n", "ends after the file"),
        (b"11 size=-1\n", "gives the size '-1'"),
        (b"99 size=1\n", "malformed"),
        (b"0 size=1\n", "malformed"),
        (b"27 GNU.sparse.realsize=999\n", "no plain file"),
        (b"999999 path=x\n", "malformed"),
        (b"x" * 500, "malformed"),
    ],
)
def test_hostile_pax_records_are_refused(tmp_path: Path, records: bytes, expected: str):
    path = tmp_path / "x.tar"
    padded = records + bytes(-len(records) % 512)
    path.write_bytes(header("././@PaxHeader", len(records), b"x") + padded + header() + bytes(1024))
    with pytest.raises(DataError, match=expected):
        list(scan_shard(path))


def test_folders_and_comments_are_passed_over(tmp_path: Path):
    folder = tarfile.TarInfo("part")
    folder.type = tarfile.DIRTYPE
    named = tarfile.TarInfo("part/a.json")
    named.pax_headers = {"comment": "who made it", "mtime": "1.5"}
    write_tar(tmp_path / "x.tar", [(folder, b""), (named, b"{}")], tarfile.PAX_FORMAT)
    assert [(key, list(members)) for key, members in scan_shard(tmp_path / "x.tar")] == [("part/a", ["json"])]


def test_links_doubled_members_and_scattered_parts_are_refused(tmp_path: Path):
    def write(*names: str, path: str = "x.tar") -> None:
        write_tar(tmp_path / path, [(tarfile.TarInfo(name), b"") for name in names])

    write("a.json", "a.json")
    with pytest.raises(DataError, match="stands twice"):
        build_index(tmp_path)
    write("a.json", "a.JSON")
    with pytest.raises(DataError, match="stands twice"):
        build_index(tmp_path)
    write("a.json", "b.json", "a.mp4")
    with pytest.raises(DataError, match="'a'.*side by side"):
        build_index(tmp_path)
    write("a.json", "b.json")
    write("c.json", "b.mp4", path="y.tar")
    with pytest.raises(DataError, match="y.tar: key 'b' is in x.tar too"):
        build_index(tmp_path)


def test_an_empty_shard_is_part_of_the_index(tmp_path: Path):
    write_tar(tmp_path / "x.tar", [(tarfile.TarInfo("a.json"), b"{}")])
    write_tar(tmp_path / "y.tar", [])
    index = build_index(tmp_path)
    assert [shard.samples for shard in index.shards] == [1, 0] and len(index) == 1
