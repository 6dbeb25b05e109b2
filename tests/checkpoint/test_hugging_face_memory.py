"""Weights larger than one wants in memory: what an import, an export and a process's slices take beyond the files.

Pages of mapped files are not counted: the kernel drops them when memory is short.
"""

import json
import subprocess
import sys

import pytest
import torch
from hugging_face_cases import differing
from safetensors.torch import save_file

from moss_train.checkpoint.hugging_face.mapping import reference_tensors
from moss_train.checkpoint.hugging_face.sizes import config_json
from moss_train.model.build import whole_model
from moss_train.model.config import ModelConfig, TextConfig, VisionConfig
from moss_train.parallel import groups
from moss_train.streams.config import TokenizerConfig
from moss_train.streams.tokenizer import SHIPPED_TOKENIZER, load_tokenizer

LIMIT = 1.2  #: of the largest tensor
SIZES = ModelConfig(
    name="wide",
    vision=VisionConfig(
        hidden_size=32, local_layers=1, global_layers=1, attention_heads=2, mlp_size=64, image_size=28,
        intermediate_layers=[0],
    ),
    text=TextConfig(
        vocabulary_size=1024, hidden_size=2048, layers=2, cross_layers=[1], attention_heads=16, key_value_heads=4,
        mlp_size=8192,
    ),
    pool_stride=1,
)  # fmt: skip

_MEASURED = """
import json, re, sys, threading, time
from pathlib import Path
import torch
from moss_train.checkpoint.hugging_face.source import HuggingFaceSource, SafetensorsFiles
from moss_train.checkpoint.hugging_face.sizes import read_sizes
from moss_train.cli import main
from moss_train.model.build import whole_model
from moss_train.parallel import groups
import moss_train.train.export_command, moss_train.train.import_command

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def peak_of(work):
    peak, done = [anonymous()], threading.Event()
    before = peak[0]
    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.001)
    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return peak[0] - before

def slices(folder):
    # What each of two tensor-parallel processes reads: half of every matrix, one after the other.
    with torch.device("meta"):
        model = whole_model(read_sizes(folder), groups.initialize())
    source = HuggingFaceSource(SafetensorsFiles(folder), model)
    for name, shape in source.shapes().items():
        for dim in range(min(2, len(shape))):
            half = tuple(size // 2 if d == dim else size for d, size in enumerate(shape))
            offsets = tuple(size - part for size, part in zip(shape, half))
            torch.empty(half, dtype=torch.bfloat16).copy_(source.read(name, offsets, half))

folder = Path(sys.argv[1])
source, checkpoint, out = folder / "source", folder / "checkpoint", folder / "exported"
torch.zeros(1 << 20, dtype=torch.bfloat16).float().sum()  # what the first use of torch takes
print(json.dumps({
    "slices": peak_of(lambda: slices(source)),
    "import": peak_of(lambda: main(["convert", "import", f"source={source}", f"out={checkpoint}"])),
    "export": peak_of(lambda: main(["convert", "export", f"ckpt={checkpoint}", f"out={out}"])),
    "rounded": peak_of(lambda: main(["convert", "export", f"ckpt={checkpoint}", f"out={out}-16", "dtype=float16"])),
}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_memory_stays_below_the_largest_tensor(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    with torch.device("meta"):
        expected = reference_tensors(whole_model(SIZES, groups.initialize()))
    groups.shutdown()
    tensors = {name: torch.full(tensor.shape, 0.5) for name, tensor in expected.items()}
    largest = max(tensor.nbytes for tensor in tensors.values())
    assert sum(tensor.nbytes for tensor in tensors.values()) > 6 * largest >= 6 * 64 * 1024**2
    save_file(tensors, source / "model.safetensors")
    del tensors
    (source / "tokenizer.json").write_bytes(SHIPPED_TOKENIZER.read_bytes())
    special = load_tokenizer(TokenizerConfig()).special
    (source / "config.json").write_text(json.dumps(config_json(SIZES, special, torch.float32)))
    run = subprocess.run([sys.executable, "-c", _MEASURED, str(tmp_path)], capture_output=True, text=True, check=True)
    peaks = json.loads(run.stdout.splitlines()[-1])
    assert {name: peak for name, peak in peaks.items() if peak > LIMIT * largest} == {}, largest
    assert differing(tmp_path / "exported", source) == []
