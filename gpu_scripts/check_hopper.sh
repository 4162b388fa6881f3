#!/usr/bin/env bash
# On a machine with a Hopper GPU: the common battery with the Hopper kernel really running, every rule of its contract,
# sampled rows at a million tokens, two runs bit-equal, and compute-sanitizer on one small case.
# Usage: gpu_scripts/check_hopper.sh [RESULTS_DIRECTORY]      (DRY_RUN=1 prints the commands; relative to the repository)
# PYTHON names an interpreter that has jax[cuda13], pytest, beartype, typer and rich; without it .venv is made.
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in -*) echo "usage: $0 [RESULTS_DIRECTORY]" >&2; exit 2 ;; esac
results=${1:-out/gpu}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
run() { printf '+'; printf ' %q' "$@"; echo; [ -n "${DRY_RUN:-}" ] || "$@"; }

if [ -z "${PYTHON:-}" ]; then
  PYTHON=.venv/bin/python
  run make .venv/.installed
  run "$PYTHON" -m pip install --quiet -c constraints.txt -e '.[cuda]'
fi
run mkdir -p "$results"
run "$PYTHON" -m mmi_jax.cli bench check --json-file "$results/check.json"
run "$PYTHON" -m pytest tests/pallas_kernels/test_block_sparse_attention.py -k mosaic_gpu
run "$PYTHON" -m pytest tests/pallas_kernels/test_mosaic_gpu.py tests/pallas_kernels/test_decode_attention.py \
  tests/pallas_kernels/test_layer_matmul.py -k on_the_device
run "$PYTHON" -m mmi_jax.cli bench attention --case 'random128 28/4 1024K' --no-baseline --repeats 1 \
  --json-file "$results/million.json"
run grep -q '"is_bit_equal": true' "$results/million.json"
# Only the kernel is instrumented, by its name; XLA tunes nothing, which would launch many kernels more.
for tool in memcheck racecheck; do
  run env XLA_FLAGS=--xla_gpu_autotune_level=0 compute-sanitizer --tool "$tool" --error-exitcode 9 \
    --kernel-name kernel_substring=block_sparse_attention "$PYTHON" -m mmi_jax.cli bench check --case tiny
done
