# Sourced by the scripts beside it: finds or makes the Python environment and defines `step`, `fail` and $python.
#
#   MOSS_TRAIN_ENV=<folder>  use this virtual environment; only what the package needs and it lacks is installed, and a
#                            PyTorch of 2.6 or newer that it has stays
#   PYTHON=<interpreter>     make .venv with this interpreter (default: the first of python3, python3.11 … ≥ 3.11)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

current_step="starting"
step() {
    current_step=$1
    printf '\n== %s\n' "$1" >&2
}
fail() {
    printf 'error: %s\n' "$1" >&2
    trap - ERR
    exit 1
}
trap 'printf "error: the step \"%s\" failed (line %s of %s)\n" "$current_step" "$LINENO" "${BASH_SOURCE[0]##*/}" >&2' ERR
set -E

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.11 python3.12 python3.13; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return 0
        fi
    done
    return 1
}

has_gpu() {
    command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU
}

# Prints nothing and succeeds when every requirement of the package and of the given extras is met.
requirements_met() {
    "$python" - "$@" <<'PY' 2>/dev/null
import sys, tomllib
from importlib.metadata import PackageNotFoundError, version
from packaging.requirements import Requirement

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
lines = list(project["dependencies"])
wanted = list(sys.argv[1:])
for extra in wanted:
    for line in project["optional-dependencies"][extra]:
        requirement = Requirement(line)
        if requirement.name == project["name"]:
            wanted += [name for name in requirement.extras if name not in wanted]
        else:
            lines.append(line)
for line in lines:
    requirement = Requirement(line)
    if requirement.marker and not requirement.marker.evaluate():
        continue
    try:
        if not requirement.specifier.contains(version(requirement.name), prereleases=True):
            sys.exit(1)
    except PackageNotFoundError:
        sys.exit(1)
PY
}

# Prints the version of the environment's PyTorch when it will do; fails otherwise.
usable_torch() {
    "$python" -c '
from importlib.metadata import version
found = version("torch")
assert tuple(map(int, found.split(".")[:2])) >= (2, 6)
print(found)' 2>/dev/null
}

install_package() {
    local torch="torch==2.13.0" pins=() found
    if [ -n "${MOSS_TRAIN_ENV:-}" ] && found=$(usable_torch); then
        pins=("torch==$found") # somebody chose it
    else
        step "installing PyTorch (a few minutes the first time)"
        if has_gpu; then
            pins=("$torch")
        else
            pins=(-c constraints-cpu.txt)
            # Only Linux has two builds; elsewhere the plain one is the CPU's.
            if [ "$(uname -s)" = Linux ] && ! "$python" -m pip install --quiet --quiet --quiet "$torch+cpu"; then
                printf 'pip finds no %s+cpu: installing plain %s, a larger download\n' "$torch" "$torch" >&2
            fi
        fi
        # A CPU build that is installed satisfies this already.
        "$python" -m pip install --quiet --quiet "$torch"
    fi
    step "installing moss_train with its video, wandb and dev extras"
    # DeepSpeed comes as source; none of its own kernels is built.
    DS_BUILD_OPS=0 "$python" -m pip install --quiet --quiet "${pins[@]}" -e '.[video,wandb,dev]'
}

if [ -n "${MOSS_TRAIN_ENV:-}" ]; then
    python="$MOSS_TRAIN_ENV/bin/python"
    [ -x "$python" ] || fail "MOSS_TRAIN_ENV=$MOSS_TRAIN_ENV holds no bin/python"
    requirements_met video wandb dev || install_package
else
    environment="$root/.venv"
    python="$environment/bin/python"
    stamp="$environment/installed.stamp"
    wanted=$(cat pyproject.toml constraints-cpu.txt launch/environment.sh | cksum)
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ] || ! "$python" -c 'import moss_train' 2>/dev/null; then
        step "creating the virtual environment .venv"
        interpreter=$(find_python) || fail "no Python ≥ 3.11 with venv found; set PYTHON=<interpreter>"
        "$interpreter" -m venv "$environment"
        install_package
        printf '%s\n' "$wanted" >"$stamp"
    fi
fi

# The tree this script stands in is the one that runs, whatever the environment has installed.
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
# megatron-core decorates small functions with torch.compile; without a GPU that costs more than it gives.
has_gpu || export TORCHDYNAMO_DISABLE="${TORCHDYNAMO_DISABLE:-1}"
