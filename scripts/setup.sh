#!/usr/bin/env bash
# Make, or reuse, a virtual environment with everything that training, tests and plots need.
#
#   bash scripts/setup.sh [VENV_DIR]      # default: .venv in the repository
#   PYTHON=python3.12 bash scripts/setup.sh
#
# The first run compiles fairseq (two to five minutes; pip caches the wheel); a later one finds the
# environment complete and ends at once.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ ${1:-} == -* ]]; then
    sed -n '2,7p' "${BASH_SOURCE[0]}"
    [[ $1 == -h || $1 == --help ]] && exit 0 || exit 2
fi
venv=${1:-$root/.venv}

# What the environment was made from: if this is unchanged, so is the environment.
wanted=$(cat "$root/constraints.txt" "$root/setup.py" "$root/scripts/setup.sh" <(echo "$root") |
    sha256sum | cut -d' ' -f1)
if [[ $(cat "$venv/.complete" 2>/dev/null) == "$wanted" && -x $venv/bin/fairseq-train ]]; then
    echo "setup.sh: $venv is complete"
    exit 0
fi

usable() { "$1" -c 'import sys, ensurepip, venv; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; }
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    for candidate in ${PYTHON:-python3.11 python3.12 python3.10 python3.13 python3}; do
        usable "$candidate" && python=$candidate && break
    done
    if [[ -z ${python:-} ]]; then
        echo "setup.sh: error: no Python 3.10 to 3.13 with the modules venv and ensurepip found" \
            "(Debian, Ubuntu: apt-get install python3-venv); or set PYTHON=/path/to/python3.11" >&2
        exit 2
    fi
    echo "setup.sh: making $venv with $("$python" --version)"
    "$python" -m venv "$venv"
fi
headers=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
if [[ ! -f $headers/Python.h ]]; then
    echo "setup.sh: error: fairseq is compiled during installation and needs Python's headers;" \
        "$headers/Python.h is missing (Debian, Ubuntu: apt-get install python3-dev)" >&2
    exit 2
fi
if ! command -v c++ >/dev/null && ! command -v g++ >/dev/null; then
    echo "setup.sh: error: fairseq is compiled during installation and needs a C++ compiler" \
        "(Debian, Ubuntu: apt-get install g++)" >&2
    exit 2
fi

install() { "$venv/bin/python" -m pip install --quiet -c "$root/constraints.txt" "$@"; }
echo "setup.sh: installing torch"
install torch numpy cython setuptools wheel
# fairseq compiles against the torch just installed; in an isolated build pip would fetch another.
echo "setup.sh: installing fairseq (compiles unless pip has its wheel)"
install --no-build-isolation fairseq-fixed
echo "setup.sh: installing fairseq_autosize and what its tests and plots need"
install --no-build-isolation -e "$root[test,plot,ctranslate2,experiments]"
echo "$wanted" >"$venv/.complete"
echo "setup.sh: $venv is complete"
