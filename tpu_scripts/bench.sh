#!/usr/bin/env bash
# On a TPU VM: attention over given lists and whole plans, each beside its dense baseline and checked before it is timed;
# one JSON line a run in out/tpu/*.json, tables in out/tpu/*.txt.
#
#   tpu_scripts/bench.sh
#
# On a machine without a TPU: DRY_RUN=1 prints the commands; PLATFORM=cpu runs the smallest case of each on the CPU.
source "$(dirname "$0")/common.sh"

attention() { # NAME CASE
  record "attention-$1.txt" $MMI bench attention --case "$2" --implementation "$implementation" --json-file "$RESULTS/attention-$1.json"
}

plans() { # NAME CASE TOKENS HEADS KV_HEADS DTYPE HEAD_DIM
  record "plans-$1.txt" $MMI bench plans --case "$2" --tokens "$3" --heads "$4" --kv-heads "$5" --dtype "$6" --head-dim "$7" \
    --implementation "$implementation" --repeats 3 --json-file "$RESULTS/plans-$1.json"
}

prepare
if [ "$PLATFORM" = cpu ]; then
  implementation=xla
  attention 8K "cpu 8K"
  plans 1K-a-shape a-shape 1024 4 2 float32 64
  exit
fi
implementation=mosaic_tpu
for size in 32K 128K; do
  for lists in all random32 random128; do
    attention "$size-$lists" "$lists 28/4 $size"
  done
done
for tokens in 32768 131072 1048576; do
  for case in a-shape grid grid-slash vertical-slash mix; do
    plans "$tokens-$case" "$case" "$tokens" 28 4 bfloat16 128
  done
done
