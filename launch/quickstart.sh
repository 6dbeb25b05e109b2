#!/usr/bin/env bash
# From nothing to a trained real-time video model and its report, on any machine, GPU or not:
#
#   ./launch/quickstart.sh [--smoke] [key=value …]
#
# renders clips, packs them into tar shards, trains all four stages, evaluates on held-out clips and writes the report to
# outputs/quickstart/. Run again, it goes on where it stopped. --smoke is the same in miniature, in outputs/smoke/.
# key=value arguments override fields of the training recipe: ./launch/quickstart.sh stages.realtime.steps=2000 seed=2
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
moss() { "$python" -m moss_train "$@"; }

started=$(date +%s)
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

if [ ! -d "$out/clips" ]; then
    step "rendering clips"
    moss data render out="$out/clips" ${clips[@]+"${clips[@]}"}
fi
for source in train/align train/temporal train/sft train/realtime heldout/realtime; do
    if [ ! -d "$out/data/$source" ]; then
        step "packing $source into tar shards"
        moss data pack source="$out/clips/$source" out="$out/data/$source"
    fi
done

step "training the four stages"
moss train recipe="$recipe" output_dir="$out" "$@"

step "evaluating on held-out clips"
moss report run="$out" requirements="$name" started="$started"
