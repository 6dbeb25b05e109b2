"""DeepSpeed's JSON from our configuration: what is made, what may be added, and what is refused before any work."""

import subprocess
import sys

import pytest

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
        ({"zero_optimization": {"allgather_bucket_size": 7}}, r"allgather_bucket_size=7: must be even"),
    ],
)  # fmt: skip
def test_what_cannot_be_passed_on(passed, message):
    with pytest.raises(ConfigError, match=message):
        check_settings(config(passed), LayoutConfig(zero=2), "bf16", cuda=False)


def test_what_lies_on_a_disk_needs_a_folder():
    offloaded = {"device": "nvme"}
    passed = {"zero_optimization": {"offload_optimizer": offloaded}}
    with pytest.raises(ConfigError, match=r"offload_optimizer\.nvme_path: must be a folder"):
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
