#!/usr/bin/env bash
# From nothing to a trained real-time video model and its report, on any machine, GPU or not:
#
#   ./launch/quickstart.sh [--smoke] [key=value …]
#
# renders clips, packs them into tar shards, trains all four stages, evaluates on held-out clips, writes the report to
# outputs/quickstart/. Run again, it goes on where it stopped. --smoke is the same in miniature (outputs/smoke/).
# key=value arguments override fields of the training recipe: stages.realtime.steps=2000 seed=2
set -euo pipefail
started=$(date +%s)
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

recipe=quickstart
if [ "${1:-}" = --smoke ]; then
    recipe=quickstart_smoke
    shift
fi
"$python" -m moss_train.train.quickstart recipe="$recipe" "$@"
