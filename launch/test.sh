#!/usr/bin/env bash
# Makes the environment if needed and runs the tests. Arguments go to pytest: ./launch/test.sh -m slow tests/model
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
step "running the tests"
"$python" -m pytest -q -rs "$@"
