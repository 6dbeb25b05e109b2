"""The seam that lets the real megatron-core run without CUDA. With CUDA only the optimizer is mended."""

import subprocess
import sys

import pytest
import torch

from moss_train.errors import ConfigError
from moss_train.parallel import groups
from moss_train.parallel.config import LayoutConfig
from moss_train.parallel.fused_layout_adam import FusedLayoutAdam

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="the seam is inactive where CUDA is available")


@without_cuda
def test_cuda_literals_reach_the_cpu():
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.tensor([1.0], device=torch.device("cuda", 0)).device.type == "cpu"
    assert torch.cuda.current_device() == torch.device("cpu")
    assert torch.zeros(1).cuda().device.type == "cpu"
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1, device="meta").device.type == "meta"


@without_cuda
def test_models_can_be_built_on_the_meta_device():
    with torch.device("meta"):
        assert torch.empty(2).device.type == "meta"
        assert torch.nn.Linear(2, 2).weight.device.type == "meta"


@without_cuda
def test_recomputation_replays_dropout():
    """Megatron's checkpoint restores random states in the backward pass: same masks, so same gradients."""
    from megatron.core.tensor_parallel.random import checkpoint

    groups.initialize()
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        x = torch.ones(64, requires_grad=True)

        def drop(x):
            return torch.nn.functional.dropout(x, 0.5, training=True) * x

        (checkpoint(drop, False, x) if recompute else drop(x)).sum().backward()
        gradients.append(x.grad)
    groups.shutdown()
    assert torch.equal(*gradients)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_equals_torch_adamw(weight_decay):
    """fp64, five steps, 1e-12."""
    torch.manual_seed(0)
    start = [torch.randn(5, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)]
    ours = [p.clone().requires_grad_() for p in start]
    theirs = [p.clone().requires_grad_() for p in start]
    options = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    optimizers = FusedLayoutAdam(ours, **options), torch.optim.AdamW(theirs, **options)
    for _ in range(5):
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            sum((p**2).sum() + p.sin().sum() for p in parameters).backward()
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    assert optimizers[0].param_groups[0]["step"] == 5


@pytest.mark.parametrize(
    ("layout", "named"),
    [
        (LayoutConfig(tp=2), "layout.tp=2"),
        (LayoutConfig(pp=4), "layout.pp=4"),
        (LayoutConfig(backend="mpi"), "layout.backend"),
        (LayoutConfig(timeout_minutes=0), "layout.timeout_minutes"),
    ],
)
def test_layouts_that_cannot_be_are_refused(layout, named):
    with pytest.raises(ConfigError, match=named):
        layout.validate(world_size=1)


@without_cuda
def test_groups_start_alone_and_can_start_again():
    code = (
        "from moss_train.parallel import groups\n"
        "a = groups.initialize(); assert (a.world_size, a.data_ranks, a.is_main) == (1, 1, True)\n"
        "assert groups.initialize() is a\n"
        "groups.shutdown()\n"
        "try: groups.state()\n"
        "except RuntimeError: pass\n"
        "else: raise SystemExit('state survived shutdown')\n"
        "groups.initialize(); groups.shutdown(); print('fine')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "fine" in done.stdout, done.stderr


@without_cuda
def test_with_cuda_only_the_optimizer_is_mended():
    """What a GPU machine without Transformer Engine and Apex gets; CUDA is pretended, so nothing may touch a device."""
    code = (
        "import torch\n"
        "torch.cuda.is_available = lambda: True\n"
        "zeros = torch.zeros\n"
        "import moss_train.parallel\n"
        "import megatron.core.optimizer as optimizer\n"
        "assert torch.zeros is zeros\n"
        "assert not optimizer.USING_PYTORCH_OPTIMIZER\n"
        "print(optimizer.Adam.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "FusedLayoutAdam" in done.stdout, done.stderr
