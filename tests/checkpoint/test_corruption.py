"""A checkpoint of two processes, damaged file by file: refused by name, by all processes alike, never loaded."""

import json
import re
import shutil

import corruption_jobs
import pytest

from moss_train.bench.equivalence.ranks import Ranks
from moss_train.bench.recovering.preparing import prepared_data, run_overrides
from moss_train.checkpoint import files
from moss_train.checkpoint.store import latest, open_checkpoint
from moss_train.errors import CheckpointError
from moss_train.parallel.groups import initialize  # noqa: F401 (imported before ranks are forked)

TENSORS = ("tensors-00000-00000.safetensors", "tensors-00001-00000.safetensors")
FILES = ("config.yaml", "index.json", "manifest.json", "provenance.json", "state.json", *TENSORS)


def truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    place = len(content) * 2 // 3
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def delete(content: bytes) -> None:
    return None


DAMAGES = (truncate, flip, delete)


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as forked:
        yield forked


@pytest.fixture(scope="module")
def run(ranks, tmp_path_factory):
    """A run of one stage on two ranks that has come to step 2 of 4: its folder and what `train` is given for it. Beside
    it, `later` has come to step 4, and `alone` was trained by one process."""
    folder = tmp_path_factory.mktemp("run")
    packed = prepared_data(folder)

    def overrides(output):
        alone = ["~stages.align", "stages.realtime.init=scratch"]
        return [*run_overrides(packed, output, steps=4, seed=1), *alone]

    assert ranks.run(2, corruption_jobs.train, overrides(folder / "later")) == [0, 0]
    assert ranks.run(1, corruption_jobs.train, overrides(folder / "alone")) == [0]
    shutil.copytree(folder / "later", folder / "pristine")
    checkpoints = folder / "pristine" / "realtime" / "checkpoints"
    shutil.rmtree(checkpoints / "step_00000004")
    (checkpoints / "latest").write_text("step_00000002\n")
    return folder, overrides


def checkpoint_of(output, step: int = 2):
    return output / "realtime" / "checkpoints" / f"step_{step:08d}"


@pytest.fixture
def copies(run, tmp_path):
    """Makes copies of the pristine run, of which one file is changed."""
    folder, _ = run

    def copy(name: str, file: str | None = None, change=None):
        output = tmp_path / name
        shutil.copytree(folder / "pristine", output)
        if file is not None:
            path = checkpoint_of(output) / file
            changed = change(path.read_bytes())
            if changed is None:
                path.unlink()
            else:
                path.write_bytes(changed)
        return output

    return copy


def refusal(path, read: bool = False) -> str:
    with pytest.raises(CheckpointError) as refused:
        reader = open_checkpoint(path)
        if read:
            reader.tensors()
    return str(refused.value)


def test_two_processes_wrote_these_files(run):
    folder, _ = run
    assert sorted(file.name for file in checkpoint_of(folder / "pristine").iterdir()) == sorted(FILES)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_any_damage_to_any_file_is_refused_by_name_on_all_processes(ranks, copies, damage):
    outputs = {file: copies(file, file, damage) for file in FILES}
    paths = {file: checkpoint_of(output) for file, output in outputs.items()}
    alone = {file: refusal(path) for file, path in paths.items()}
    told = ranks.run(2, corruption_jobs.open_each, [*paths.values(), checkpoint_of(copies("whole"))])
    assert [answers.pop() for answers in told] == [None, None]
    for number, (file, path) in enumerate(paths.items()):
        answers = {rank: told[rank][number] for rank in (0, 1)}
        assert file in alone[file] and str(path) in alone[file]
        # The tensors' files are divided among the ranks, so that one of them alone has met the damage.
        assert answers == {0: alone[file], 1: alone[file]}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("file", FILES)
def test_a_run_does_not_go_on_from_a_damaged_checkpoint(ranks, run, copies, file, damage):
    _, overrides = run
    output = copies("damaged", file, damage)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    told = ranks.run(2, corruption_jobs.resume, overrides(output))
    assert [(code, reads) for code, _, reads in told] == [(2, 0), (2, 0)]
    words = "".join(words for _, words, _ in told)
    (line,) = [line for line in words.splitlines() if line.startswith("error: ")]  # of one of the two
    assert file in line and str(checkpoint_of(output)) in line and "Traceback" not in words
    # Nothing was trained, and nothing of the checkpoint was touched.
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_whole_it_goes_on(ranks, run, copies):
    _, overrides = run
    output = copies("whole")
    for code, _, reads in ranks.run(2, corruption_jobs.resume, overrides(output)):
        assert code == 0 and reads > 50
    assert latest(output / "realtime" / "checkpoints") == checkpoint_of(output, 4)


# Files that are whole, but not where they belong


def exchange(one, other) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


@pytest.mark.parametrize("pair", [TENSORS, ("state.json", "provenance.json"), ("index.json", "state.json")])
def test_files_in_each_others_places(ranks, copies, pair):
    path = checkpoint_of(copies("swapped"))
    exchange(*(path / file for file in pair))
    told = [refusal(path), *(answers[0] for answers in ranks.run(2, corruption_jobs.open_each, [path]))]
    assert all(any(file in message for file in pair) for message in told)


@pytest.mark.parametrize(
    ("source", "differing"),
    [
        ("later", {"manifest.json", "state.json", *TENSORS}),
        ("alone", {"config.yaml", "index.json", "manifest.json", "state.json", TENSORS[0]}),
    ],
)
def test_a_file_of_another_checkpoint(ranks, run, copies, source, differing):
    folder, _ = run
    other = checkpoint_of(folder / source, 4)
    paths = {}
    for file in FILES:
        path = checkpoint_of(copies(file))
        if (other / file).exists() and (other / file).read_bytes() != (path / file).read_bytes():
            shutil.copyfile(other / file, path / file)
            paths[file] = path
    assert paths.keys() == differing
    told = ranks.run(2, corruption_jobs.open_each, list(paths.values()))
    for number, (file, path) in enumerate(paths.items()):
        answer = refusal(path)
        assert told[0][number] == told[1][number] == answer
        # Under another's manifest any file may be the one that does not fit.
        assert any(name in answer for name in (FILES if file == files.MANIFEST else (file,)))


def test_files_that_are_not_listed_are_not_read(ranks, copies):
    path = checkpoint_of(copies("more"))
    (path / "tensors-00002-00000.safetensors").write_bytes(b"x")
    assert open_checkpoint(path).shapes() and ranks.run(2, corruption_jobs.open_each, [path], True) == [[None]] * 2


# A manifest that was renewed after the change, as by a faulty or malicious writer


def renewed(path, change) -> None:
    index = json.loads((path / "index.json").read_text())
    change(index["tensors"])
    (path / "index.json").write_text(json.dumps(index))
    (path / files.MANIFEST).unlink()
    files.write_manifest(path, 2)


def sliced(tensors) -> str:
    """A tensor of several rows that lies in one slice."""
    return next(
        name for name, entry in tensors.items() if len(entry["slices"]) == 1 and (entry["shape"] or [0])[0] >= 2
    )


def double_a_slice(tensors) -> None:
    entry = tensors[sliced(tensors)]
    entry["slices"] *= 2


def cover_a_place_twice_and_one_never(tensors) -> None:
    entry = tensors[sliced(tensors)]
    (whole,) = entry["slices"]
    half = whole["shape"][0] // 2
    entry["slices"] = [whole | {"shape": [half, *whole["shape"][1:]]} for _ in range(2)]
    if whole["shape"][0] % 2:
        entry["slices"].append(whole | {"shape": [1, *whole["shape"][1:]]})


def leave_a_slice_out(tensors) -> None:
    tensors[sliced(tensors)]["slices"].clear()


def point_to_the_other_file(tensors) -> None:
    (piece,) = tensors[sliced(tensors)]["slices"]
    piece["file"] = TENSORS[1 - TENSORS.index(piece["file"])]


def exchange_two_tensors(tensors) -> None:
    one, other = [name for name in tensors if name.startswith("model/") and len(tensors[name]["shape"]) == 2][:2]
    tensors[one]["slices"], tensors[other]["slices"] = tensors[other]["slices"], tensors[one]["slices"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (double_a_slice, "index.json: .*the slices hold"),
        (cover_a_place_twice_and_one_never, "index.json: .*two slices hold the same elements"),
        (leave_a_slice_out, "index.json: .*the slices hold 0 of"),
        (point_to_the_other_file, r"tensors-0000[01]-00000\.safetensors: .*cannot be read"),
        (exchange_two_tensors, "index.json: .*"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_an_index_that_cannot_be_is_refused_though_the_manifest_agrees(ranks, copies, change, message):
    path = checkpoint_of(copies("renewed"))
    renewed(path, change)
    told = [refusal(path, read=True)]
    told += [answers[0] for answers in ranks.run(2, corruption_jobs.open_each, [path], True)]
    for found in told:
        assert re.search(message, found), found


def test_another_checkpoints_index_under_a_renewed_manifest(ranks, run, copies):
    """One process's index names whole tensors, where two processes wrote other slices."""
    folder, _ = run
    path = checkpoint_of(copies("mixed"))
    shutil.copyfile(checkpoint_of(folder / "alone") / "index.json", path / "index.json")
    (path / files.MANIFEST).unlink()
    files.write_manifest(path, 2)
    assert "safetensors" in refusal(path, read=True)
    for (answer,) in ranks.run(2, corruption_jobs.open_each, [path], True):
        assert "safetensors" in answer
