"""Saved in one layout, loaded in every other: each tensor bit for bit, one more step within design §5's tolerances."""

import pytest
import reshard_jobs

from moss_train.bench.equivalence.cases import Case, Problem
from moss_train.bench.equivalence.ranks import Ranks
from moss_train.checkpoint.store import load_checkpoint
from moss_train.parallel.config import LayoutConfig
from moss_train.parallel.groups import initialize  # noqa: F401 (imported before ranks are forked)

LAYOUTS = {
    "one": LayoutConfig(),
    "tp2-sp-dp2-zero1": LayoutConfig(tp=2, sp=True, dp=2, zero=1),
    "pp2-vpp2": LayoutConfig(pp=2, vpp=2),
    "tp2-pp2": LayoutConfig(tp=2, pp=2),
    "cp2-dp2-zero1": LayoutConfig(cp=2, dp=2, zero=1),
    "pp4-uneven": LayoutConfig(pp=4, pipeline_split=[1, 3, 3, 1]),
    "tp2-cp2": LayoutConfig(tp=2, cp=2),
    "pp2-dp2-zero1": LayoutConfig(pp=2, dp=2, zero=1, frame_shard="tp"),
    "deepspeed-zero1-tp2-sp-dp2": LayoutConfig(tp=2, sp=True, dp=2, zero=1),
    "deepspeed-zero3-tp2-dp2": LayoutConfig(tp=2, dp=2, zero=3),
    "deepspeed-zero1-pp2-dp2": LayoutConfig(pp=2, dp=2, zero=1),
    "deepspeed-pp2-tp2-dualpipev": LayoutConfig(pp=2, tp=2, pipeline_schedule="dualpipev"),
}
#: of the other engine, each layout loads what these saved; of its own, what all did
ACROSS = ("tp2-sp-dp2-zero1", "pp4-uneven", "deepspeed-zero3-tp2-dp2", "deepspeed-zero1-pp2-dp2")


def case_of(layout: str, precision: str = "fp32", **options) -> Case:
    engine = "deepspeed" if layout.startswith("deepspeed") else "megatron"
    problem = Problem(optimizer="adamw", **options)
    return Case(problem=problem, layout=LAYOUTS[layout], precision=precision, engine_name=engine)


@pytest.fixture(scope="module")
def ranks():
    with Ranks(4) as forked:
        yield forked


def saved_in(ranks, folder, layouts, **options) -> dict[str, str]:
    """Layout → folder of a checkpoint saved in it."""
    folders = {}
    for layout in layouts:
        case = case_of(layout, **options)
        folders[layout] = str(folder / layout)
        told = ranks.run(case.world_size, reshard_jobs.save_after_a_step, case, folders[layout])
        sizes = [one["rank_bytes"] for one in told]
        # Everyone writes about as much as the others where the layout lets them.
        assert "pp" in layout or max(sizes) < 1.7 * sum(sizes) / len(sizes)
    return folders


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    return saved_in(ranks, tmp_path_factory.mktemp("saved"), LAYOUTS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_what_any_layout_saved(ranks, saved, layout):
    case = case_of(layout)
    folders = [
        folder for name, folder in saved.items() if name in ACROSS or case_of(name).engine_name == case.engine_name
    ]
    problems = ranks.run(case.world_size, reshard_jobs.load_and_train_on, case, folders)[0]
    assert {folder: found for folder, found in problems.items() if found} == {}


def test_processes_wrote_files_of_their_own(saved):
    files = {path.name for path in (saved_path(saved, "tp2-pp2")).glob("*.safetensors")}
    assert {name.split("-")[1] for name in files} == {"00000", "00001", "00002", "00003"}
    assert not list(saved_path(saved, "tp2-pp2").glob("part-*"))


def saved_path(saved, layout):
    return load_checkpoint(f"{saved[layout]}/step_00000001", only=()).path


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_parts_have_no_optimizer_state_and_move_too(ranks, tmp_path, precision):
    layouts = ("tp2-sp-dp2-zero1", "pp2-vpp2", "one")
    check_among(ranks, tmp_path, layouts, trainable="projector_xattn", precision=precision)


def test_frozen_parts_move_between_deepspeed_and_megatron_too(ranks, tmp_path):
    layouts = ("tp2-sp-dp2-zero1", "deepspeed-zero1-pp2-dp2", "deepspeed-zero3-tp2-dp2")
    check_among(ranks, tmp_path, layouts, trainable="projector_xattn", precision="bf16")


def check_among(ranks, tmp_path, layouts, **options):
    saved = saved_in(ranks, tmp_path, layouts, **options)
    for layout in layouts:
        case = case_of(layout, **options)
        problems = ranks.run(case.world_size, reshard_jobs.load_and_train_on, case, list(saved.values()))[0]
        assert {folder: found for folder, found in problems.items() if found} == {}
