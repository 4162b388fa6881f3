#!/usr/bin/env bash
# On a machine with a Hopper GPU: the common battery with the Hopper kernel really running, every rule of its contract,
# the kernels of estimates, decoding and products, sampled rows at a million tokens, two runs bit-equal, and
# compute-sanitizer on one small case. A check that fails does not keep the others from running; the status says so.
# Usage: gpu_scripts/check_hopper.sh [RESULTS_DIRECTORY]      (DRY_RUN=1 prints the commands; relative to the repository)
# PYTHON names an interpreter that has jax[cuda13], pytest, beartype, typer and rich; without it .venv is made.
# Status 1: a check failed. Status 3: all that ran passed, but there is no compute-sanitizer.
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in -*) echo "usage: $0 [RESULTS_DIRECTORY]" >&2; exit 2 ;; esac
results=${1:-out/gpu}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
run() { printf '+'; printf ' %q' "$@"; echo; [ -n "${DRY_RUN:-}" ] || "$@"; }
outcomes=()
check() {  # NAME COMMAND...
  local name=$1 start=$SECONDS outcome=passed
  shift
  run "$@" || outcome="FAILED, status $?"
  outcomes+=("$name: $outcome, $((SECONDS - start)) s")
}

if [ -z "${PYTHON:-}" ]; then
  PYTHON=.venv/bin/python
  run make .venv/.installed
  run "$PYTHON" -m pip install --quiet -c constraints.txt -e '.[cuda]'
fi
run mkdir -p "$results"
check "rules" "$PYTHON" -m mmi_jax.cli bench check --json-file "$results/check.json"
check "battery" "$PYTHON" -m pytest tests/pallas_kernels/test_block_sparse_attention.py -k mosaic_gpu
check "on the device" "$PYTHON" -m pytest tests/pallas_kernels/test_mosaic_gpu.py \
  tests/pallas_kernels/test_column_mass.py tests/pallas_kernels/test_decode_attention.py \
  tests/pallas_kernels/test_layer_matmul.py -k on_the_device
check "million tokens" "$PYTHON" -m mmi_jax.cli bench attention --case 'random128 28/4 1024K' --no-baseline \
  --repeats 1 --json-file "$results/million.json"
check "bit-equal" grep -q '"is_bit_equal": true' "$results/million.json"
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
if [ -n "${DRY_RUN:-}$sanitizer" ]; then
  # Only the kernel is instrumented, by its name; XLA tunes nothing, which would launch many kernels more.
  for tool in memcheck racecheck; do
    check "$tool" env XLA_FLAGS=--xla_gpu_autotune_level=0 "${sanitizer:-compute-sanitizer}" --tool "$tool" \
      --error-exitcode 9 --kernel-name kernel_substring=block_sparse_attention \
      "$PYTHON" -m mmi_jax.cli bench check --case tiny
  done
else
  outcomes+=("memcheck, racecheck: NOT RUN, there is no compute-sanitizer")
fi
[ -n "${DRY_RUN:-}" ] || printf '%s\n' "${outcomes[@]}"
case "${outcomes[*]}" in *FAILED*) exit 1 ;; *"NOT RUN"*) exit 3 ;; esac
