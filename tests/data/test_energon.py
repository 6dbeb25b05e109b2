"""Shards that `data pack` writes are a dataset for Megatron Energon too: prepared and read, the same bytes."""

import hashlib
from pathlib import Path

import pytest
import torch
from data_samples import packed_streams

from moss_train.data.corpus import load_source

pytest.importorskip("megatron.energon", reason="the extra energon is not installed")


def digest(members: dict[str, bytes]) -> torch.Tensor:
    whole = b"".join(bytes(members[name]) for name in ("json", "mp4"))
    return torch.tensor(list(hashlib.sha256(whole).digest()), dtype=torch.uint8)


def test_energon_reads_what_we_pack(tmp_path: Path):
    from moss_train.bench.data_loading.energon import samples
    from moss_train.bench.data_loading.loaders import prepared_folder
    from moss_train.bench.data_loading.sources import CaseSources

    folder = packed_streams(tmp_path / "sources" / "case", 9, shard_samples=4)
    case = CaseSources("case", {"case": folder}, sorted(folder.glob("*.tar")), {}, 1)
    read = {sample.__key__.rpartition("/")[2]: sample.frames for sample in samples(prepared_folder(case), digest)}
    corpus = load_source(folder)
    ours = {
        corpus.key(n): digest({member: corpus.member(n, member) for member in ("json", "mp4")})
        for n in range(len(corpus))
    }
    assert read.keys() == ours.keys() and len(read) == 9
    assert all(torch.equal(read[key], ours[key]) for key in ours)
