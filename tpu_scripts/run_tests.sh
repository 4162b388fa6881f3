#!/usr/bin/env bash
# On a TPU VM: the library for TPU, then the test battery on the chip; results in out/tpu/tests.xml.
#
#   tpu_scripts/run_tests.sh [TEST...]          all kernels' and the method's tests, or those named
#
# On a machine without a TPU: DRY_RUN=1 prints the commands; PLATFORM=cpu runs them on the CPU.
source "$(dirname "$0")/common.sh"

prepare
tests=("$@")
[ $# -gt 0 ] || tests=(tests/pallas_kernels tests/mmi_jax)
run .venv/bin/pytest "${tests[@]}" --junitxml "$RESULTS/tests.xml"
