#!/usr/bin/env bash
# Set up if needed, then lint, format check and tests, two at a time. Arguments go to pytest:
#
#   bash scripts/test.sh                  # everything
#   bash scripts/test.sh -m 'not heavy'   # without the tests that train
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh"
cd "$root"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest -n 2 "$@"
