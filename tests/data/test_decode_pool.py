"""Decoder processes: results as in-process, deadlines, crashes, clean ends."""

import io
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_samples import numbered_clip, read_numbers
from PIL import Image

from moss_train.data.decoding import pool as pool_module
from moss_train.data.decoding.decode import DecodeLimits
from moss_train.data.decoding.describe import DescribeJob
from moss_train.data.decoding.job import DecodeJob, digest_of, run_job
from moss_train.data.decoding.pool import DecodeFailure, DecodePool
from moss_train.data.decoding.probe import probe_media
from moss_train.data.decoding.shared import SharedArrays
from moss_train.errors import DataError, SampleError


def job_of(path: Path, data: bytes, key: str = "k", times_s: tuple[float, ...] = (0.0, 0.5)) -> DecodeJob:
    path.write_bytes(b"before" + data + b"after")
    return DecodeJob(key, str(path), 6, len(data), digest_of(data), times_s, 64, "auto", None, DecodeLimits())


def test_the_pool_gives_what_the_process_itself_would(tmp_path: Path):
    jobs = [job_of(tmp_path / f"{n}", numbered_clip(6, 4, first=n), f"k{n}") for n in range(6)]
    pool = DecodePool(2, 60)
    try:
        for number, future in enumerate([pool.submit(job) for job in jobs]):
            decoded, here = future.result(60), run_job(jobs[number])
            assert read_numbers(decoded.frames, 32) == [number, number + 2]
            assert np.array_equal(decoded.frames, here.frames) and decoded.backend == here.backend == "decord"
            assert np.array_equal(decoded.times_s, here.times_s)
            assert decoded.frames.flags.writeable
    finally:
        pool.close()


def test_failures_come_back_with_key_reason_and_exception(tmp_path: Path):
    pool = DecodePool(1, 60)
    try:
        bad = pool.submit(job_of(tmp_path / "a", b"\0\0\0 ftypisom" + bytes(500), "bad"))
        gone = pool.submit(replace(job_of(tmp_path / "x", b"", "gone"), shard=str(tmp_path / "none")))
        short = pool.submit(replace(job_of(tmp_path / "x", b"", "short"), size=10**6))
        good = pool.submit(job_of(tmp_path / "b", numbered_clip(3, 4), "good"))
        with pytest.raises(DecodeFailure) as caught:
            bad.result(60)
        assert caught.value.key == "bad" and "Error" in caught.value.exception
        for future, text in ((gone, "cannot read"), (short, "cut short")):
            with pytest.raises(DataError, match=text):
                future.result(60)
        assert len(good.result(60).frames) == 2
    finally:
        pool.close()


def test_a_process_that_hangs_is_killed_at_the_deadline_and_replaced(tmp_path: Path):
    pool = DecodePool(1, 60)
    try:
        pool.submit(job_of(tmp_path / "a", numbered_clip(3, 4))).result(60)
        process = pool._processes[0]._process
        process.send_signal(signal.SIGSTOP)
        pool._timeout_s = 0.5
        began = time.monotonic()
        with pytest.raises(SampleError, match="decoding took longer than 0.5 s .decode_timeout_s."):
            pool.submit(job_of(tmp_path / "b", numbered_clip(3, 4))).result(60)
        assert time.monotonic() - began < 20 and process.poll() is not None
        pool._timeout_s = 60
        assert len(pool.submit(job_of(tmp_path / "c", numbered_clip(3, 4))).result(60).frames) == 2
    finally:
        pool.close()


def test_a_process_that_others_end_costs_nothing(tmp_path: Path):
    """As the system does when memory is short: the sample is no worse for it."""
    pool = DecodePool(1, 60)
    try:
        pool.submit(job_of(tmp_path / "a", numbered_clip(3, 4))).result(60)
        process = pool._processes[0]._process
        process.send_signal(signal.SIGSTOP)
        future = pool.submit(job_of(tmp_path / "b", numbered_clip(3, 4)))
        process.kill()
        assert len(future.result(60).frames) == 2 and pool._processes[0]._process is not process
    finally:
        pool.close()


def test_a_sample_over_which_two_processes_die_is_to_blame(tmp_path: Path, monkeypatch):
    replace_worker(monkeypatch, """print('{"ready": null}', flush=True); input(); import os; os._exit(3)""")
    pool = DecodePool(1, 60)
    try:
        with pytest.raises(SampleError, match="'crash': the process died over decoding .exit code 3"):
            pool.submit(job_of(tmp_path / "b", numbered_clip(3, 4), "crash")).result(60)
        monkeypatch.undo()
        assert len(pool.submit(job_of(tmp_path / "c", numbered_clip(3, 4))).result(60).frames) == 2
    finally:
        pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(job_of(tmp_path / "d", numbered_clip(3, 4)))


def replace_worker(monkeypatch, code: str) -> None:
    """Decoder processes run `code` instead."""
    start = subprocess.Popen
    monkeypatch.setattr(
        "moss_train.data.decoding.pool.subprocess.Popen",
        lambda command, **options: start([command[0], "-c", code], **options),
    )


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import no_such_module", "could not start .exit code 1."),
        ("import time; time.sleep(60)", "did not start within 0.5 s"),
        ("print('hello')", "started with b'hello'"),
    ],
)
def test_a_process_that_does_not_start_is_no_fault_of_the_sample(tmp_path: Path, monkeypatch, code, expected):
    monkeypatch.setattr("moss_train.data.decoding.pool.START_TIMEOUT_S", 0.5 if "sleep" in code else 60)
    replace_worker(monkeypatch, code)
    pool = DecodePool(1, 60)
    try:
        with pytest.raises(DataError, match=expected):
            pool.submit(job_of(tmp_path / "a", numbered_clip(3, 4))).result(60)
        monkeypatch.undo()
        assert len(pool.submit(job_of(tmp_path / "b", numbered_clip(3, 4))).result(60).frames) == 2
    finally:
        pool.close()


@pytest.mark.parametrize("shared", [True, False])
def test_pictures_are_mapped_where_that_is_possible_and_read_from_the_pipe_elsewhere(
    tmp_path: Path, monkeypatch, shared
):
    if not shared:
        monkeypatch.setattr(pool_module, "can_map", lambda process, descriptor: False)
    mapped, original = [], pool_module.map_array
    monkeypatch.setattr(pool_module, "map_array", lambda *told: mapped.append(told) or original(*told))
    pool = DecodePool(1, 60)
    try:
        large = replace(job_of(tmp_path / "a", numbered_clip(6, 4)), image_size=448)
        small = replace(large, image_size=64)
        before = len(os.listdir("/proc/self/fd"))
        first, second = (pool.submit(large).result(60).frames for _ in range(2))
        assert len(mapped) == (2 if shared else 0)
        assert np.array_equal(pool.submit(small).result(60).frames, run_job(small).frames)
        assert len(mapped) == (2 if shared else 0), "small pictures are not worth a mapping"
        assert np.array_equal(first, second) and np.array_equal(first, run_job(large).frames)
        first[:] = 0  # each job has memory of its own, which its receiver may write
        assert second.any()
        # Neither side keeps a descriptor: the cache may hold thousands of clips.
        worker = Path(f"/proc/{pool._processes[0]._process.pid}/fd")
        assert not any("pictures" in os.readlink(path) for path in worker.iterdir())
        assert len(os.listdir("/proc/self/fd")) <= before + 3  # the pipes of the process
    finally:
        pool.close()
    assert second.any(), "the memory outlives the process that made it"


def test_shared_pictures_have_a_bound():
    shared = SharedArrays(2 << 20)
    with pytest.raises(MemoryError):
        shared.empty(((2 << 20) + 1,))
    array = shared.empty((1 << 20,))
    assert not array.any() and shared.descriptor(array) is not None and shared.descriptor(array.copy()) is None
    assert shared.descriptor(shared.empty((10,))) is None
    shared.release()
    assert shared.descriptor(array) is None


@pytest.mark.parametrize("reply", ["{oops", "3", "[]", '{"backend": "x"}', '{"failed": "sample"}', '{"shape": "a"}'])
def test_a_process_that_talks_nonsense_is_replaced(tmp_path: Path, monkeypatch, reply):
    replace_worker(
        monkeypatch, f"print('{{\"ready\": null}}', flush=True); input(); print({reply!r}, flush=True); input()"
    )
    pool = DecodePool(1, 60)
    try:
        with pytest.raises(SampleError, match="'bad': the worker process gave a reply"):
            pool.submit(job_of(tmp_path / "a", numbered_clip(3, 4), "bad")).result(60)
        monkeypatch.undo()
        assert len(pool.submit(job_of(tmp_path / "b", numbered_clip(3, 4))).result(60).frames) == 2
    finally:
        pool.close()


def test_changed_bytes_are_no_sample(tmp_path: Path):
    job = replace(job_of(tmp_path / "a", numbered_clip(3, 4)), digest=digest_of(b"others"))
    pool = DecodePool(1, 60)
    try:
        for run in (lambda: pool.submit(job).result(60), lambda: run_job(job)):
            with pytest.raises(SampleError, match="bytes differ from those that were indexed"):
                run()
    finally:
        pool.close()


def test_members_are_described(tmp_path: Path):
    """As the index wants them; what does not fit in the process's memory is a fault of the medium alone."""
    large = io.BytesIO()
    Image.new("RGB", (6000, 6000)).save(large, "PNG")
    files = {"medium": numbered_clip(3, 4), "json": b'{"schema": "x"}', "other": b"notes", "large": large.getvalue()}
    pool = DecodePool(1, 60, memory_mb=200)
    try:
        found = {}
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
            kind = "medium" if name == "large" else name
            job = DescribeJob("k", str(tmp_path / name), 0, len(data), kind, 10**8, None)
            found[name] = pool.submit(job).result(60)
            assert found[name].digest == digest_of(data)
        assert found["medium"].media == probe_media(files["medium"]) and found["medium"].fault is None
        assert found["json"].schema == "x" and found["other"].media is None
        assert "MemoryError" in found["large"].fault
        assert (
            run_job(DescribeJob("k", str(tmp_path / "large"), 0, len(data), "medium", 10**8, None)).media.width == 6000
        )
    finally:
        pool.close()


def test_the_shard_is_held_while_it_is_read(tmp_path: Path):
    """Fetching is no part of the deadline, and a shard that cannot be fetched is no fault of the sample."""
    events: list[str] = []

    class Store:
        def prefetch(self, location: str, size: int | None = None) -> None:
            events.append(f"prefetch {location} {size}")

        @contextmanager
        def held(self, location: str, size: int | None = None):
            if location == "s3://gone":
                raise DataError("s3://gone cannot be fetched")
            pool._timeout_s = 60
            events.append("held")
            yield tmp_path / "a"
            events.append("released")

    job = replace(job_of(tmp_path / "a", numbered_clip(3, 4)), shard="s3://there", shard_size=9)
    pool = DecodePool(1, 0.0, store=Store())
    try:
        assert len(pool.submit(job).result(60).frames) == 2
        with pytest.raises(DataError, match="s3://gone cannot be fetched"):
            pool.submit(replace(job, shard="s3://gone")).result(60)
        assert events == ["prefetch s3://there 9", "held", "released", "prefetch s3://gone 9"]
        assert len(run_job(job, Store()).frames) == 2
    finally:
        pool.close()


def test_closing_cancels_what_waits(tmp_path: Path):
    pool = DecodePool(1, 60)
    futures = [pool.submit(job_of(tmp_path / f"{n}", numbered_clip(3, 4))) for n in range(20)]
    pool.close()
    assert all(future.done() for future in futures)
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(job_of(tmp_path / "x", b""))


def test_decoder_processes_do_not_outlive_their_owner(tmp_path: Path):
    """The owner is killed without a chance to clean up; its decoder processes end by themselves."""
    job_of(tmp_path / "a", clip := numbered_clip(3, 4))
    owner = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import time\nfrom moss_train.data.decoding.describe import DescribeJob\n"
            "from moss_train.data.decoding.pool import DecodePool\npool = DecodePool(1, 60)\n"
            f"job = DescribeJob('k', {str(tmp_path / 'a')!r}, 6, {len(clip)}, 'medium', 10**7, None)\n"
            "pool.submit(job).result()\n"
            "print(pool._processes[0]._process.pid, flush=True)\ntime.sleep(600)",
        ],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    worker = int(owner.stdout.readline())
    owner.kill()
    owner.wait()
    for _ in range(200):
        try:
            state = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return  # ended; whoever adopted it has not read its exit code yet
        time.sleep(0.05)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the decoder process lives on")


def test_the_decoder_process_starts_without_torch():
    code = "import sys, moss_train.data.decoding.worker as w; print('torch' in sys.modules)"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env).stdout == "False\n"
