"""The command line: `moss-train <verb> [key=value …]`.

Only the module of the verb that runs is imported, so that help and misspelt verbs answer at once. A command is a
function that takes its options dataclass (or, for `train`, the raw overrides) and returns the exit code.
Errors that a user can mend are one line (and at most a short list) on standard error and exit code 2; anything else
keeps its traceback.
"""

import difflib
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Sequence

from moss_train import __version__
from moss_train.errors import CheckpointError, ConfigError, MossTrainError
from moss_train.exit_codes import INTERRUPTED, MISTAKE
from moss_train.redact import covered

#: verb → (module : stem, line that help shows). The module holds `<stem>_command` and `<Stem>Options`.
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("moss_train.train.command:train", "train a recipe, or resume it where it stopped"),
    "data render": ("moss_train.data.synthetic.render:render", "render the built-in synthetic clips"),
    "data convert": ("moss_train.data.convert:convert", "convert annotations and media to samples"),
    "data synth": ("moss_train.synthesis.command:synth", "captions to real-time dialogues with revised answers"),
    "data pack": ("moss_train.data.shards.pack:pack", "write samples into indexed tar shards"),
    "data index": ("moss_train.data.shards.index_command:index", "index existing tar shards"),
    "data show": ("moss_train.data.show:show", "draw one sample: frames, who speaks when, what is trained"),
    "data stats": ("moss_train.data.stats:stats", "histograms of lengths, packing efficiency, balance of ranks"),
    "data check": ("moss_train.data.shards.check:check", "validate shards, samples and media"),
    "convert import": ("moss_train.train.import_command:import", "Hugging Face weights to a checkpoint"),
    "convert export": ("moss_train.train.export_command:export", "a checkpoint to a Hugging Face folder"),
    "convert verify": ("moss_train.checkpoint.verify:verify", "compare the model with reference outputs"),
    "eval": ("moss_train.train.evaluate_command:evaluate", "free-running figures of a checkpoint on packed streams"),
    "report": ("moss_train.train.pipeline_report:report", "a finished run against itself untrained, as a page"),
    "stream": ("moss_train.train.stream_command:stream", "play a clip and print what the model says"),
    "bench layouts": ("moss_train.bench.layouts:layouts", "random layouts against one process: does a number change?"),
    "bench behaviour": ("moss_train.bench.behaviour:behaviour", "what each piece of the real-time method is worth"),
    "bench checkpoint": ("moss_train.bench.checkpoint:checkpoint", "saving and loading beside torch.save and a copy"),
    "bench cost": ("moss_train.bench.cost:cost", "what tokens and frames cost on this machine: data.cost to paste"),
    "bench data": ("moss_train.bench.data:data", "our loader beside webdataset and Energon; packing and planning"),
    "bench fuzz": ("moss_train.bench.fuzz:fuzz", "damaged and hostile inputs: nothing crashes, hangs or is lost"),
    "bench recovery": ("moss_train.bench.recovery:recovery", "killed at random and resumed: is a bit lost?"),
    "bench parallel": ("moss_train.bench.parallel:parallel", "time, bytes sent and memory of parallel layouts"),
    "bench stream": (
        "moss_train.bench.stream:stream",
        "first tokens, rates and frame latency beside a decoder-only model",
    ),
    "bench engines": ("moss_train.bench.engines:engines", "time, memory and bytes sent of each engine and ZeRO stage"),
    "doctor": ("moss_train.doctor:doctor", "versions, devices and what is missing"),
}
_OFFENDERS_SHOWN = 8  #: of a list that may be long
#: Verbs whose function takes the raw overrides; their module's HELP is printed for --help.
RAW_VERBS = ("train",)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the process's exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Threads that spin while they wait take the processor from the decoders and from each other: on two busy cores a
    # step was twenty times slower. Read when torch is first imported, so it must be set before.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Megatron warns about every fused library it does not find; `moss-train doctor` says the same once.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    try:
        return _run(arguments)
    except MossTrainError as error:
        if not error.told_elsewhere:
            shown = None if isinstance(error, CheckpointError) else _OFFENDERS_SHOWN
            print(f"error: {_message(str(error), shown)}", file=sys.stderr)
        return MISTAKE
    except OSError as error:  # a folder that cannot be written, a full disk, a file that is not there
        print(f"error: {_message(_describe(error))}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _message(text: str, shown: int | None = _OFFENDERS_SHOWN) -> str:
    """One line, and below it the first of a list of offenders (lines indented by two), if the error has one; None shows
    all: tensors that do not fit are mended together. Secrets in what the error quotes are covered."""
    head, *offenders = (covered(" ".join(part.split())) for part in text.split("\n  "))
    shown = len(offenders) if shown is None else shown
    hidden = len(offenders) - shown
    more = [f"… and {hidden} more"] if hidden > 0 else []
    return "\n  ".join([head, *offenders[:shown], *more])


def _describe(error: OSError) -> str:
    reason = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename is not None else reason


def _run(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("--version", "-V"):
        print(f"moss_train {__version__}")
        return 0
    words: list[str] = []
    for argument in arguments[:2]:
        if "=" in argument or argument.startswith("-"):
            break
        words.append(argument)
    for count in (2, 1):
        name = " ".join(words[:count])
        if len(words) >= count and name in COMMANDS:
            return _call(name, arguments[count:])
    if any(argument in ("--help", "-h") for argument in arguments) or not arguments:
        _show(_help(words[0] if words else ""))
        return 0
    if not words:
        raise ConfigError(f"{arguments[0]!r} stands where a verb should; see moss-train --help")
    below = [name for name in COMMANDS if name.split()[0] == words[0]]
    if below and len(words) == 1:
        raise ConfigError(f"{words[0]!r} needs one of: {', '.join(name.split()[1] for name in below)}")
    given = " ".join(words)
    verbs = list(dict.fromkeys([*COMMANDS, *(name.split()[0] for name in COMMANDS)]))
    close = difflib.get_close_matches(given, verbs, n=2, cutoff=0.6) or below or list(COMMANDS)
    raise ConfigError(f"unknown verb {given!r}; did you mean {' or '.join(close)}?")


def _call(name: str, arguments: list[str]) -> int:
    from moss_train.cli_options import describe_options, parse_options

    path, _, stem = COMMANDS[name][0].partition(":")
    module = importlib.import_module(path)
    function = getattr(module, f"{stem}_command")
    wants_help = any(argument in ("--help", "-h") for argument in arguments)
    if name in RAW_VERBS:
        if wants_help:
            _show(f"usage: moss-train {name} key=value …\n\n{module.HELP}")
            return 0
        return function(arguments)
    options_class = getattr(module, f"{stem.capitalize()}Options")
    if wants_help:
        documentation = inspect.cleandoc(function.__doc__ or COMMANDS[name][1])
        _show(f"usage: moss-train {name} key=value …\n\n{documentation}\n\noptions:\n{describe_options(options_class)}")
        return 0
    return function(parse_options(options_class, arguments))


def _show(text: str) -> None:
    """Print help; a reader who has seen enough (`| head`) is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (the interpreter flushes it on exit)


def _help(group: str) -> str:
    names = [name for name in COMMANDS if not group or name.split()[0] == group]
    if not names:
        raise ConfigError(f"unknown verb {group!r}; see moss-train --help")
    lines = "\n".join(f"  {name:<18}{COMMANDS[name][1]}" for name in names)
    return (
        "usage: moss-train <verb> [key=value …]      moss-train <verb> --help lists a verb's keys\n\n"
        f"{lines}\n\nEvery key that a verb takes can be read in its help; recipes are described in docs/recipes.md."
    )
