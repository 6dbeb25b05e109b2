"""DeepSpeed's JSON from our configuration: what is made, what may be added, and what is refused before any work."""

import logging
import subprocess
import sys

import pytest

from moss_train.engines import require_engine
from moss_train.engines.config import EngineConfig
from moss_train.engines.deepspeed_settings import check_settings, deepspeed_settings
from moss_train.engines.engine_rules import check_engine, check_optimizer
from moss_train.errors import ConfigError
from moss_train.parallel.config import LayoutConfig


def config(passed=None, **options) -> EngineConfig:
    return EngineConfig(name="deepspeed", deepspeed=passed or {}, **options)


def test_fields_of_ours_become_deepspeeds():
    settings = deepspeed_settings(
        config(overlap_grad_reduce=True, initial_loss_scale=2.0**20), LayoutConfig(zero=2), "fp16", clip=0.5
    )
    assert settings["gradient_clipping"] == 0.5
    assert settings["zero_optimization"] == {
        "stage": 2,
        "overlap_comm": True,
        "memory_efficient_linear": False,
        "ignore_unused_parameters": True,
        "reduce_bucket_size": 50_000_000,
    }
    assert settings["fp16"]["initial_scale_power"] == 20 and settings["fp16"]["loss_scale"] == 0.0
    assert settings["communication_data_type"] == "fp32" and "bf16" not in settings
    constant = deepspeed_settings(config(loss_scale=128.0), LayoutConfig(zero=1), "fp16", clip=0.0)
    assert constant["fp16"]["loss_scale"] == 128.0


def test_what_is_passed_on_joins_what_is_ours():
    passed = {
        "zero_optimization": {"offload_optimizer": {"device": "cpu"}, "zero_hpz_partition_size": 2},
        "communication_data_type": "bf16",
    }
    engine = config(passed)
    check_settings(engine, LayoutConfig(zero=3), "bf16")
    settings = deepspeed_settings(engine, LayoutConfig(zero=3), "bf16", clip=1.0)
    assert settings["zero_optimization"]["stage"] == 3
    assert settings["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert settings["communication_data_type"] == "bf16"
    assert engine.deepspeed == passed  # was not written to


@pytest.mark.parametrize(
    ("passed", "message"),
    [
        ({"gradient_clipping": 1.0}, r"deepspeed\.gradient_clipping=1\.0: follows from stages\.<name>\.optim\.clip"),
        ({"zero_optimization": {"stage": 1}}, r"deepspeed\.zero_optimization\.stage=1: follows from layout\.zero"),
        ({"bf16": {"enabled": True}}, r"engine\.deepspeed\.bf16\.enabled=True: follows from precision"),
        ({"fp16": {"hysteresis": 1}}, r"engine\.deepspeed\.fp16: means nothing with precision=bf16"),
        ({"optimizer": {"type": "AdamW"}}, r"engine\.deepspeed\.optimizer: is not set here; set stages\.<name>\.optim"),
        ({"train_batch_size": 8}, r"engine\.deepspeed\.train_batch_size: is not set here"),
        ({"zero_optimisation": {}}, r"engine\.deepspeed\.zero_optimisation: legal names are .*zero_optimization"),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, r"zenflow=.*transposes the weights"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, r"zero_quantized_weights=True: needs CUDA"),
        ({"zero_optimization": {"zero_quantized_nontrainable_weights": True}}, r"8 bits of frozen weights"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, r"_param\.device='cpu': needs layout\.zero=3"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, r"device='nvme': needs layout\.zero=3"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, r"offload_param\.device='nvme': "),
        ({"zero_optimization": {"offload_optimizer": {"device": "disk"}}}, r"device='disk': legal values are none"),
        ({"zero_optimization": 3}, r"zero_optimization=3: must be an object"),
        ({"bf16": True}, r"engine\.deepspeed\.bf16=True: must be an object of fields"),
        ({"data_types": "bf16"}, r"data_types='bf16': must be an object of fields"),
        ({"aio": None}, r"aio=None: must be an object of fields"),
        ({"gradient_clipping": {}}, r"gradient_clipping=\{\}: follows from"),
        ({"zero_optimization": {"stage": {"a": 1}}}, r"zero_optimization\.stage=.* follows from layout\.zero"),
        ({"data_types": {"grad_accum_dtype": "bf61"}}, r"dtype='bf61': legal values .*precision=bf16 are fp32, bf16$"),
        ({"data_types": {"grad_accum_dtype": "fp16"}}, r"grad_accum_dtype='fp16': legal values"),
        ({"data_types": {"grad_accum_dtyp": "bf16"}}, r"grad_accum_dtyp='bf16': legal names are grad_accum_dtype"),
        ({"communication_data_type": "float8"}, r"communication_data_type='float8': legal values are fp32, bf16, fp16"),
        ({"aio": {"blok": 5}}, r"aio\.blok=5: legal names are block_size, queue_depth"),
        ({"aio": {"block_size": "big"}}, r"aio\.block_size='big': must be a whole number"),
        ({"aio": {"use_gds": True}}, r"aio\.use_gds=True: needs CUDA, and this machine has none; remove it"),
        ({"timers": {"foo": 1}}, r"timers\.foo=1: legal names are throughput"),
        ({"timers": {"throughput": False}}, r"timers\.throughput=False: must be an object of fields"),
        ({"flops_profiler": {"enable": True}}, r"flops_profiler\.enable=True: legal names are enabled"),
        ({"flops_profiler": {"top_modules": 1.5}}, r"top_modules=1\.5: must be a whole number"),
        ({"wall_clock_breakdown": "yes"}, r"wall_clock_breakdown='yes': must be true or false"),
        ({"dump_state": True}, r"dump_state: is not set here; its reports are not shown; set tracking"),
        ({"steps_per_print": 1}, r"steps_per_print: is not set here; its reports are not shown"),
        ({"comms_logger": {"enabled": True}}, r"comms_logger: is not set here; its reports are not shown"),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, r"bf16_master_weights_and_grads=True: .*float32"),
        ({"bf16": {"bf16_optimizer_states": True}}, r"bf16\.bf16_optimizer_states=True: checkpoints hold"),
        ({"zero_optimization": {"compute_grad_norm": False}}, r"compute_grad_norm=False: the gradient's norm is repor"),
        ({"zero_optimization": {"allgather_bucket_size": "big"}}, r"bucket_size='big': must be a whole number"),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, r"reduce_bucket_size='auto': nothing here replaces"),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, r"offload_optimizer='cpu': must be an object"),
        ({"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}}, r"offload_optimizer\.ratio=0\.5: "),
        ({"zero_optimization": {"stage3_prefetch_bucket_size": 2}}, r"prefetch_bucket_size=2: is read with "),
        ({"zero_optimization": {"cpu_offload_use_pin_memory": True}}, r"use_pin_memory=True: is DeepSpeed's old name"),
        ({"zero_optimization": {"stage3_gather_16bit_weights_on_model_save": True}}, r"save=True: checkpoints"),
        ({"data_types": {"grad_accum_dtype": None}}, r"grad_accum_dtype=None: legal values"),
        ({"zero_optimization": {"zero_hpz_partition_size": 2}}, r"hpz_partition_size=2: is read with layout\.zero=3"),
        ({"zero_optimization": {"allgather_bucket_size": 7}}, r"allgather_bucket_size=7: must be even"),
    ],
)  # fmt: skip
def test_what_cannot_be_passed_on(passed, message):
    with pytest.raises(ConfigError, match=message):
        check_settings(config(passed), LayoutConfig(zero=2), "bf16", cuda=False)


def test_what_means_nothing_without_zero():
    offloaded = config({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}})
    check_settings(offloaded, LayoutConfig(zero=1), "fp32")
    with pytest.raises(
        ConfigError, match=r"offload_optimizer\.device='cpu': needs ZeRO; set layout\.zero to 1, 2 or 3"
    ):
        check_settings(offloaded, LayoutConfig(), "fp32")


def test_float16_keeps_its_weights_in_float32():
    with pytest.raises(ConfigError, match=r"fp16\.fp16_master_weights_and_grads=True: checkpoints hold"):
        check_settings(config({"fp16": {"fp16_master_weights_and_grads": True}}), LayoutConfig(zero=2), "fp16")


def test_what_is_read_is_passed():
    passed = {
        "aio": {"block_size": 1048576, "single_submit": False},
        "data_types": {"grad_accum_dtype": "bf16"},
        "flops_profiler": {"enabled": True, "profile_step": 2, "output_file": "/tmp/flops"},
        "timers": {"throughput": {"enabled": True, "synchronized": False}},
        "memory_breakdown": False,
        "wall_clock_breakdown": True,
        "zero_optimization": {"allgather_bucket_size": 5e8, "stage3_max_live_parameters": 10, "offload_param": None},
    }
    engine = config(passed)
    check_engine(engine, LayoutConfig(zero=3), "bf16")
    require_engine(engine, LayoutConfig(zero=3), "bf16")
    assert deepspeed_settings(config(), LayoutConfig(zero=3), "bf16", clip=0.0)["timers"] == {
        "throughput": {"enabled": False}
    }


def test_overlap_in_bfloat16_needs_zero_2_or_buckets():
    one, overlapped = LayoutConfig(zero=1), {"overlap_grad_reduce": True}
    check_engine(config(**overlapped), LayoutConfig(zero=2), "bf16")
    check_engine(config(**overlapped), one, "fp32")
    check_engine(config({"data_types": {"grad_accum_dtype": "bf16"}}, **overlapped), one, "bf16")
    with pytest.raises(ConfigError, match=r"overlap_grad_reduce=true: .*set layout\.zero=2, or false"):
        check_engine(config(**overlapped), one, "bf16")


@pytest.mark.parametrize(
    ("passed", "precision", "message"),
    [
        ({"zero_optimization": {"reduce_bucket_sise": 5}}, "fp32", r"optimization\.reduce_bucket_sise=5: .*_size$"),
        ({"zero_optimization": {"reduce_scatter": "x"}}, "fp32", r"zero_optimization\.reduce_scatter='x': .*boolean"),
        ({"zero_optimization": {"reduce_bucket_size": 0}}, "fp32", r"reduce_bucket_size=0: .*greater than 0"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin": 1}}}, "fp32",
            r"zero_optimization\.offload_optimizer\.pin=1: .*pin_memory",
        ),
        ({"zero_optimization": {"nothing_alike": 1}}, "fp32", r"nothing_alike=1: legal names are .*reduce_scatter"),
        ({"fp16": {"min_loss_scale": 0}}, "fp16", r"engine\.deepspeed\.fp16\.min_loss_scale=0: .*must be > 0"),
        ({"fp16": {"loss_scale_window": "x"}}, "fp16", r"fp16\.loss_scale_window='x': .*must be an integer"),
        ({"bf16": {"immediate": True}}, "bf16", r"bf16\.immediate=True: "),
        ({"timers": {"throughput": {"on": 1}}}, "bf16", r"timers\.throughput\.on=1: "),
    ],
)  # fmt: skip
def test_deepspeed_reads_the_rest_before_any_work(passed, precision, message):
    check_engine(config(passed), LayoutConfig(zero=2), precision)
    with pytest.raises(ConfigError, match=message):
        require_engine(config(passed), LayoutConfig(zero=2), precision)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_deepspeed_takes_what_is_ours(zero):
    for precision in ("fp32", "bf16", "fp16")[: 3 if zero else 1]:
        require_engine(config(), LayoutConfig(zero=zero), precision)


def test_what_a_disk_needs_is_said_before_any_work(monkeypatch):
    monkeypatch.setattr("moss_train.engines.deepspeed_library.disk_access_problem", lambda: "ninja")
    passed = {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/local/run"}}}
    with pytest.raises(ConfigError, match=r"offload_optimizer\.device=nvme: .*needs ninja; install it, or set cpu"):
        require_engine(config(passed), LayoutConfig(zero=3), "fp32")


def test_a_machine_without_deepspeed_is_told_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"engine\.name=deepspeed: DeepSpeed cannot be imported"):
        require_engine(config(), LayoutConfig(), "fp32")
    require_engine(EngineConfig(), LayoutConfig(), "fp32")


def test_warnings_that_our_own_report_repeats_are_dropped(caplog):
    require_engine(config(), LayoutConfig(), "fp32")
    logger = logging.getLogger("DeepSpeed")
    logger.addHandler(caplog.handler)
    try:
        logger.warning("[deepspeed] OVERFLOW! Rank 0 Skipping step. Attempted loss scale: 2, reducing to 1")
        logger.warning("something else")
    finally:
        logger.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records] == ["something else"]


def test_what_lies_on_a_disk_needs_a_folder():
    offloaded = {"device": "nvme"}
    passed = {"zero_optimization": {"offload_optimizer": offloaded}}
    with pytest.raises(ConfigError, match=r"offload_optimizer\.nvme_path=None: must be a folder"):
        check_settings(config(passed), LayoutConfig(zero=3), "bf16")
    offloaded["nvme_path"] = "/local/run"
    check_settings(config(passed), LayoutConfig(zero=3), "bf16")


@pytest.mark.parametrize(
    ("engine", "layout", "precision", "message"),
    [
        (config(), LayoutConfig(pp=2, zero=2), "bf16", r"layout\.zero=2: .*set layout\.zero to 0 or 1"),
        (config(), LayoutConfig(pp=2, vpp=2), "fp32", r"layout\.vpp=2: .*layout\.vpp=1 .*or engine\.name=megatron"),
        (config(), LayoutConfig(pp=2, batch_p2p=False), "fp32", r"layout\.batch_p2p=false: says how the megatron"),
        (config(), LayoutConfig(pp=2), "bf16", r"layout\.zero=0: with precision=bf16"),
        (config(overlap_grad_reduce=True), LayoutConfig(pp=2, zero=1), "fp32", r"reduce=true: with pipeline"),
        (
            config({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}), LayoutConfig(pp=2, zero=1), "fp32",
            r"offload_optimizer: .*\(layout\.pp=2\); remove it",
        ),
        (
            config({"wall_clock_breakdown": True}), LayoutConfig(pp=2, zero=1), "bf16",
            r"wall_clock_breakdown=True: .*\(layout\.pp=2\); remove it",
        ),
        (
            config({"flops_profiler": {"enabled": True}}), LayoutConfig(pp=2, zero=1), "bf16",
            r"flops_profiler\.enabled=True: .*\(layout\.pp=2\); remove it",
        ),
        (EngineConfig(), LayoutConfig(pp=2, pipeline_schedule="dualpipev"), "fp32", r"dualpipev: is DeepSpeed's"),
        (config(), LayoutConfig(), "bf16", r"layout\.zero=0: with precision=bf16 .*set layout\.zero to 1, 2 or 3"),
        (config(), LayoutConfig(), "fp16", r"layout\.zero=0: with precision=fp16"),
        (config(), LayoutConfig(zero=1), "fp8", r"precision=fp8: is of the megatron engine"),
        (config(overlap_param_gather=True), LayoutConfig(zero=1), "fp32", r"overlap_param_gather=true: is of"),
        (config(overlap_grad_reduce=True), LayoutConfig(), "fp32", r"overlap_grad_reduce=true: .*layout\.zero above 0"),
        (config(initial_loss_scale=1000.0), LayoutConfig(zero=1), "fp16", r"powers of 2; set 1024"),
        (config(loss_scale=8.0), LayoutConfig(zero=1), "bf16", r"engine\.loss_scale=8\.0: only fp16"),
        (EngineConfig(), LayoutConfig(zero=2), "fp32", r"layout\.zero=2: the megatron engine knows 0 and 1"),
        (EngineConfig(deepspeed={"aio": {}}), LayoutConfig(), "fp32", r"engine\.deepspeed: is read by .* alone"),
    ],
)  # fmt: skip
def test_what_an_engine_refuses(engine, layout, precision, message):
    with pytest.raises(ConfigError, match=message):
        check_engine(engine, layout, precision)


def test_sgd_is_sharded_by_deepspeed_alone():
    check_optimizer(config(), LayoutConfig(zero=1), "sgd")
    with pytest.raises(ConfigError, match=r"optim\.name=sgd: megatron shards AdamW only"):
        check_optimizer(EngineConfig(), LayoutConfig(zero=1), "sgd")


def test_deepspeed_is_not_imported_before_it_is_chosen():
    code = "import sys, moss_train.engines.megatron, moss_train.train.stage; assert 'deepspeed' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
