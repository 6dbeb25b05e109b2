#!/usr/bin/env bash
# From nothing to a trained real-time video model and its report, on any machine, GPU or not:
#
#   ./launch/quickstart.sh [--smoke] [key=value …]
#
# renders clips, packs them into tar shards, trains all four stages, evaluates on held-out clips and writes the report to
# outputs/quickstart/. Run again, it goes on where it stopped; when the code that renders the clips has changed, it starts
# anew. --smoke is the same in miniature, in outputs/smoke/.
# key=value arguments override fields of the training recipe: ./launch/quickstart.sh stages.realtime.steps=2000 seed=2
# data=synth trains the real-time stage on dialogues that `data synth` writes from the captions of the same clips, in
# outputs/quickstart_synth/; everything else, the held-out clips too, is the same.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
moss() { "$python" -m moss_train "$@"; }

SECONDS=0 # the run's time, without the installation's
if [ "${1:-}" = --smoke ]; then
    shift
    name=smoke
    recipe=quickstart_smoke
    clips=(align=64 temporal=24 sft=48 realtime=128 heldout=16)
else
    name=quickstart
    recipe=quickstart
    clips=()
fi
out=outputs/$name
synth=
for argument in "$@"; do
    [ "$argument" != data=synth ] || synth=1 out=outputs/${name}_synth
done

# $out/seconds: the time that made what is there, over interrupted runs; one that finds everything done adds nothing.
what_is_there() { cat "$out"/{clips,data}/render.json "$out"/*/checkpoints/*/manifest.json 2>/dev/null | cksum || true; }
seconds() {
    local before
    before=$(cat "$out/seconds" 2>/dev/null || echo 0)
    if [ "$(what_is_there)" = "$found" ]; then echo "$before"; else echo $((before + SECONDS)); fi
}
remember_seconds() {
    local total
    total=$(seconds)
    [ ! -d "$out" ] || echo "$total" >"$out/seconds"
}
found=$(what_is_there)
trap remember_seconds EXIT

step "rendering clips"
moss data render out="$out/clips" overwrite=true ${clips[@]+"${clips[@]}"}
if ! cmp -s "$out/clips/render.json" "$out/data/render.json"; then
    step "packing the clips into tar shards"
    # What was made from other clips goes, models too.
    find "$out" -mindepth 1 -maxdepth 1 ! -name clips -exec rm -r {} +
    for source in train/align train/temporal train/sft train/realtime heldout/realtime heldout/sft; do
        moss data pack source="$out/clips/$source" out="$out/data/$source"
    done
    cp "$out/clips/render.json" "$out/data/render.json"
fi
if [ -n "$synth" ]; then
    step "writing dialogues from the clips' captions"
    # at the rate at which the recipe's replies are spoken
    moss data synth source=rendered path="$out/clips/train/realtime" out="$out/synth" copy=false tokens_per_second=8 \
        overwrite=true
    if ! cmp -s "$out/synth/synth.jsonl" "$out/data/synth.jsonl"; then
        # What learnt from other dialogues goes.
        find "$out" -mindepth 1 -maxdepth 1 ! -name clips ! -name data ! -name synth -exec rm -r {} +
        moss data pack source="$out/synth" out="$out/data/train/realtime_synth" overwrite=true
        cp "$out/synth/synth.jsonl" "$out/data/synth.jsonl"
    fi
fi

step "training the four stages"
if has_gpu; then
    processes=$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')
else
    # Two processes of one thread train about twice as fast as one process of two threads.
    processes=$("$python" -c 'import os; print(min(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()))')
    threads=(OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}")
fi
train=(train recipe="$recipe" output_dir="$out" "$@")
# Matrices are multiplied four times faster in bf16 where the processor can. What is asked for goes before, and what a run
# began with; DeepSpeed needs ZeRO for bf16.
case " $* " in
*" precision="* | *" recipe="* | *" engine=deepspeed"* | *" engine.name=deepspeed"*) ;;
*)
    precision=$(sed -n 's/^precision: //p' "$out/config.yaml" 2>/dev/null || true)
    train+=(precision="${precision:-auto}")
    ;;
esac
if [ "$processes" = 1 ]; then
    moss "${train[@]}"
else
    # A mistake in the overrides is one line here; from several processes it would be many.
    [ $# = 0 ] || moss "${train[@]}" dry_run=true >/dev/null
    env ${threads[@]+"${threads[@]}"} "$python" -m torch.distributed.run --standalone --nproc-per-node "$processes" \
        -m moss_train "${train[@]}"
fi

remember_seconds
trap - EXIT # the report counts its own
step "evaluating on held-out clips"
moss report run="$out" requirements="$name" spent_s="$(cat "$out/seconds")"
