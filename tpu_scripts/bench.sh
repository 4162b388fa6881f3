#!/usr/bin/env bash
# On a TPU VM: the kernel's rules, attention over given lists and whole plans, each beside its dense baseline and checked
# before it is timed; a JSON line in out/tpu/*.json, tables in out/tpu/*.txt.
#
#   tpu_scripts/bench.sh
#
# On a machine without a TPU: DRY_RUN=1 prints the commands; PLATFORM=cpu runs the smallest case of each on the CPU.
source "$(dirname "$0")/common.sh"

bench() { # NAME KIND OPTION...
  local name=$1
  shift
  record "$name.txt" $MMI bench "$@" --implementation "$implementation" --json-file "$RESULTS/$name.json"
}

prepare
if [ "$PLATFORM" = cpu ]; then
  implementation=xla
  bench check check --case tiny
  bench attention attention --case "cpu 8K" --repeats 1
  bench plans plans --case a-shape --tokens 1024 --heads 4/2 --head-dim 64 --repeats 1
  exit
fi
implementation=mosaic_tpu
bench check check
for size in 32K 128K; do
  bench "attention-$size" attention --case "all 28/4 $size" --case "random32 28/4 $size" --case "random128 28/4 $size"
done
for tokens in 32768 131072 1048576; do
  bench "plans-$tokens" plans --tokens "$tokens" --heads 28/4 --head-dim 128 --dtype bfloat16 --repeats 3
done
