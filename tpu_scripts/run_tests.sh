#!/usr/bin/env bash
# On a TPU VM: installs the library for TPU, then runs the test battery and the attention benchmark on the chip.
# Usage: tpu_scripts/run_tests.sh [RESULTS_DIRECTORY]      (DRY_RUN=1 prints the commands)
set -euo pipefail
cd "$(dirname "$0")/.."
results=${1:-out/tpu}
run() { echo "+ $*"; [ -n "${DRY_RUN:-}" ] || "$@"; }

run make .venv/.installed
run .venv/bin/python -m pip install --quiet -c constraints.txt -e '.[tpu]'
run mkdir -p "$results"
run .venv/bin/mmi doctor
run .venv/bin/pytest -x tests/pallas_kernels tests/mmi_jax
run .venv/bin/mmi prefill --demo
run .venv/bin/mmi bench attention --case 'cpu 8K' --json-file "$results/attention.json"
