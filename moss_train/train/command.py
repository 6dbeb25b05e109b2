"""`moss-train train`. Light to import: help must not wait for torch."""

import os
from collections.abc import Sequence

from moss_train.errors import ConfigError

HELP = """\
Train a recipe: moss-train train recipe=<name> [key=value …]

  recipe=NAME            align, temporal, sft, realtime (one stage), pipeline (all four), quickstart, quickstart_smoke,
                         or a file below recipes=DIR/recipe/
  model=NAME             tiny, bench, moss_video_1b, moss_video_11b, moss_video_90b, llama_3_2_vision_11b,
                         llama_3_2_vision_90b; sizes below model.*
  layout=NAME            data_parallel (default), tp2_sp, tp4_pp2, …: docs/layouts.md; degrees: layout.tp, layout.pp, …
  precision=NAME         fp32 (default), bf16 (the published recipes'), fp16, fp8, auto (what is fast here)
  tracking=NAME          offline (default), online, disabled
  data_root=DIR          packed folders align/ temporal/ sft/ realtime/ that the stages read
  stages.NAME.KEY=VALUE  any field of one stage; stages.*.KEY=VALUE of every stage
  stages.NAME.objective=NAME  reference, silence_weight, moss_vl, streamo, videollm_online, dispider: docs/objectives.md
  stages.NAME.init=PATH  start from a checkpoint, a stage's or run's folder, or Hugging Face safetensors; or: scratch
  output_dir=DIR         checkpoints and reports; running the same command again goes on where it stopped
  dry_run=true           check everything, print the resolved pipeline and stop
  watchdog.stall_s=N     seconds without progress after which the run is ended with a report; null: never
  recipes=DIR            a folder of your own recipe files beside the shipped ones

  On several processes: torchrun --nproc-per-node 8 -m moss_train train recipe=…
  Every field with its meaning: docs/recipes.md; signals, exit codes, restarts: docs/recovery.md"""


def train_command(arguments: Sequence[str]) -> int:
    """Compose, check and train; the exit codes stand in `moss_train.exit_codes`."""
    from moss_train.train.signals import StopRequest, exit_code

    with StopRequest() as stop:  # before the imports below, which take seconds
        from moss_train.train.compose import compose_run

        try:
            run = compose_run(arguments)
        except ConfigError as error:
            # Every process reads the same words: one of a node says what is wrong with them.
            error.told_elsewhere = os.environ.get("LOCAL_RANK", "0") != "0"
            raise

        from moss_train.parallel import groups
        from moss_train.train.pipeline import run_pipeline
        from moss_train.train.watchdog import PeerLost, end_without

        try:
            signal = run_pipeline(run, stop)
        except PeerLost as lost:
            end_without(lost)
        finally:
            groups.shutdown()
        if signal:
            stop.obeyed()
        return exit_code(signal)
