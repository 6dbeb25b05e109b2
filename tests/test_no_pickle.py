"""Nothing that runs what it reads: no pickle, no code from files, on any path of the program (issue 5, Security).

A scan of the program's own text. It follows imports under other names; what hides from a reader
(`getattr(torch, "lo" + "ad")`) hides from it too.
"""

import ast
from pathlib import Path

import pytest

import moss_train

PACKAGE = Path(moss_train.__file__).parent

#: modules that read files by running what stands in them
MODULES = {
    "pickle", "_pickle", "cPickle", "pickle5", "cloudpickle", "dill", "joblib", "shelve", "marshal", "pandas",
    "torch.package", "torch.distributed.checkpoint", "megatron.core.dist_checkpointing",
}  # fmt: skip
#: functions that do, by their full names
FUNCTIONS = {
    "torch.load", "torch.save", "torch.hub.load", "torch.jit.load", "torch.serialization.load", "yaml.load",
    "yaml.load_all", "yaml.full_load", "yaml.full_load_all", "yaml.unsafe_load", "yaml.unsafe_load_all",
    "hydra.utils.instantiate", "eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec",
    "builtins.compile", "builtins.__import__", "code.InteractiveInterpreter", "runpy.run_path",
}  # fmt: skip
#: methods and functions that do, whatever they belong to: torch.distributed pickles the objects it sends
METHODS = {
    "all_gather_object", "gather_object", "scatter_object_list", "broadcast_object_list", "send_object_list",
    "recv_object_list", "read_pickle", "to_pickle",
}  # fmt: skip
#: function → argument and values with which it reads plain content only
HARMLESS_WITH = {
    "torch.load": ("weights_only", {"True"}),
    "yaml.load": ("Loader", {"yaml.SafeLoader", "yaml.CSafeLoader"}),
    "yaml.load_all": ("Loader", {"yaml.SafeLoader", "yaml.CSafeLoader"}),
}
#: keyword arguments that must be false, of whatever they are given to
KEYWORDS = {"allow_pickle", "trust_remote_code"}
#: what sends pickled objects from process to process; threads do not
CHANNELS = ("multiprocessing", "torch.multiprocessing", "concurrent.futures.ProcessPoolExecutor")

#: Modules that may use the channels: all stays between a process and children that it made itself, over pipes that
#: nobody else holds; nothing of it comes from a file or the network.
EXCEPTIONS = {
    "bench/data_loading/measure.py": "a fork for each timed run returns its figures",
    "bench/data_loading/sources.py": "worker processes encode the clips of the benchmark",
    "bench/equivalence/ranks.py": "forked ranks are given jobs and return results",
    "bench/fuzzing/walk.py": "a fork is given hostile inputs; it answers with a JSON file",
    "bench/recovering/job.py": "forked ranks are given their overrides",
    "data/synthetic/render.py": "worker processes are given which clips to render",
    "synthesis/command.py": "worker processes are given captions and return samples as text",
}
#: file → what may stand in it, and why
ALLOWED = {"bench/checkpoint.py": {"calls torch.save": "what our save is timed against; nothing reads the file"}}


def offences(text: str) -> list[str]:
    """What in a module's text must not be, with its line."""
    tree = ast.parse(text)
    known = _imported(tree)
    found: list[tuple[int, str]] = []
    judged: set[ast.AST] = set()  # functions of calls, which their arguments may make harmless
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = _names_of(node)
            found += [(node.lineno, f"imports {name}") for name in names if _within(name, MODULES)]
            found += [(node.lineno, f"imports {name}") for name in names if name.rpartition(".")[2] in METHODS]
        elif isinstance(node, ast.Call):
            name = _dotted(node.func, known)
            judged.add(node.func)
            if _is_forbidden(name) and not _is_harmless(node, name, known):
                found.append((node.lineno, f"calls {name}"))
            for argument in node.keywords:
                if argument.arg in KEYWORDS and not _is_false(argument.value):
                    found.append((node.lineno, f"gives {argument.arg}={ast.unparse(argument.value)}"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load) and node not in judged:
            name = _dotted(node, known)
            if _is_forbidden(name) or _within(name, MODULES):
                found.append((node.lineno, f"hands on {name}"))
    return [f"line {line}: {why}" for line, why in sorted(set(found))]


def channels(text: str) -> list[str]:
    """The imports of what sends pickled objects to other processes."""
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    return [name for node in nodes for name in _names_of(node) if _within(name, CHANNELS)]


def _names_of(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module}.{alias.name}" for alias in node.names]


def _imported(tree: ast.AST) -> dict[str, str]:
    """Name in this module → what it stands for."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return known


def _dotted(node: ast.AST, known: dict[str, str]) -> str:
    """The full name of what is referred to; for a method of something computed, "….<method>"."""
    if isinstance(node, ast.Name):
        return known.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, known)}.{node.attr}"
    return "…"


def _within(name: str, modules) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _is_forbidden(name: str) -> bool:
    return name in FUNCTIONS or ("." in name and name.rpartition(".")[2] in METHODS)


def _is_harmless(call: ast.Call, name: str, known: dict[str, str]) -> bool:
    if name not in HARMLESS_WITH:
        return False
    argument, values = HARMLESS_WITH[name]
    given = [keyword.value for keyword in call.keywords if keyword.arg == argument]
    if argument == "Loader" and len(call.args) > 1:
        given.append(call.args[1])
    return any(_dotted(value, known) in values or ast.unparse(value) in values for value in given)


def _is_false(value: ast.AST) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


MODULES_OF_THE_PROGRAM = sorted(PACKAGE.rglob("*.py"))


def _place(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", MODULES_OF_THE_PROGRAM, ids=_place)
def test_nothing_runs_what_it_reads(path):
    text = path.read_text(encoding="utf-8")
    allowed = ALLOWED.get(_place(path), {})
    assert [offence for offence in offences(text) if offence.partition(": ")[2] not in allowed] == []
    if _place(path) not in EXCEPTIONS:
        assert channels(text) == [], "processes that exchange pickled objects: say why in EXCEPTIONS, or use JSON"


def test_every_exception_is_needed():
    assert [name for name in EXCEPTIONS if not channels((PACKAGE / name).read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle",
        "import os, pickle",
        "def f(path):\n    from pickle import loads as read\n    return read(path)",
        "import dill as d",
        "from joblib import load",
        "import shelve",
        "import marshal",
        "import torch.distributed.checkpoint as dcp",
        "from torch.distributed import checkpoint",
        "from megatron.core import dist_checkpointing",
        "import torch\ntorch.load(path)",
        "import torch as t\nt.load(path, weights_only=False)",
        "import torch\ntorch.load(path, weights_only=safe)",
        "from torch import load\nload(path)",
        "from torch import load as read\nread(path)",
        "import torch\nread = torch.load",
        "import torch\nlist(map(torch.load, paths))",
        "import torch\ntorch.save(x, path)",
        "import torch\ntorch.hub.load('a/b', 'c')",
        "import torch\ntorch.distributed.checkpoint.load(state)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import numpy as np\nnp.load(path, allow_pickle=allowed)",
        "import yaml\nyaml.load(text)",
        "import yaml\nyaml.load(text, Loader=yaml.FullLoader)",
        "import yaml\nyaml.load(text, yaml.UnsafeLoader)",
        "from yaml import unsafe_load\nunsafe_load(text)",
        "from yaml import load, Loader\nload(text, Loader)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "import torch.distributed as dist\ndist.all_gather_object(told, own)",
        "import torch.distributed as dist\ndist.broadcast_object_list([x])",
        "from torch.distributed import gather_object\ngather_object(x)",
        "import torch.distributed as dist\nsend = dist.send_object_list",
        "group().send_object_list([x])",
        "eval(text)",
        "exec(text)",
        "import builtins\nbuiltins.exec(text)",
        "run = eval",
        "compile(text, 'a', 'exec')",
        "__import__(name)",
        "from hydra.utils import instantiate\ninstantiate(config)",
    ],
)
def test_planted_code_is_found(planted):
    assert offences(planted)


@pytest.mark.parametrize(
    "harmless",
    [
        "model.eval()",
        "import re\nre.compile('a')",
        "corpus.compile(3)",
        "import json\njson.load(file)",
        "import torch\ntorch.load(path, weights_only=True)",
        "import yaml\nyaml.safe_load(text)",
        "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
        "import numpy as np\nnp.load(path)\nnp.load(path, allow_pickle=False)",
        "from safetensors.torch import load\nload(content)",
        "from omegaconf import OmegaConf\nOmegaConf.to_object(config)",
        "from concurrent.futures import ThreadPoolExecutor",
        "'pickle'",
    ],
)
def test_what_is_harmless_is_not(harmless):
    assert offences(harmless) == []
    assert channels(harmless) == []


@pytest.mark.parametrize(
    "planted",
    [
        "import multiprocessing",
        "from multiprocessing import get_context",
        "from multiprocessing.connection import Client",
        "import torch.multiprocessing as mp",
        "from concurrent.futures import ProcessPoolExecutor",
    ],
)
def test_a_channel_of_pickled_objects_is_found(planted):
    assert channels(planted)
