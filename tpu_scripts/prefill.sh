#!/usr/bin/env bash
# Prefill on TPUs: a model, a video and a question over all chips of a machine or of a slice; results in out/tpu/prefill*.
#
#   tpu_scripts/prefill.sh MODEL VIDEO [OPTIONS of mmi prefill]        on a TPU VM
#   tpu_scripts/prefill.sh --slice NAME ZONE MODEL VIDEO [OPTIONS]     from anywhere with gcloud: on every host of a slice
#
# MODEL is a directory or a name on the hub, VIDEO a file; both must be there on every host, under the same path, as this
# repository must be, in ~/mmi-jax. All hosts run one and the same command and find each other through jax.distributed;
# the first of them prints. For how long a prompt may be: mmi aot --topology v5e:4x4 --longest.
# On a machine without a TPU: DRY_RUN=1 prints the commands; PLATFORM=cpu runs on CPU devices.
source "$(dirname "$0")/common.sh"

if [ "${1:-}" = --slice ]; then
  [ $# -ge 5 ] || { echo "usage: $0 --slice NAME ZONE MODEL VIDEO [OPTIONS]" >&2; exit 2; }
  name=$2 zone=$3
  shift 3
  run gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker all \
    --command "cd ~/mmi-jax && DISTRIBUTED=1 tpu_scripts/prefill.sh $(printf '%q ' "$@")"
  exit
fi

[ $# -ge 2 ] || { echo "usage: $0 MODEL VIDEO [OPTIONS]" >&2; exit 2; }
model=$(from_start "$1") video=$(from_start "$2")
shift 2
for option in "$@"; do
  case "$option" in
    --pattern | --pattern=* | --table | --table=*)
      echo "$0 compares dense attention with Grid: expected no --pattern or --table, got $option" >&2
      exit 2
      ;;
  esac
done
prepare
over=--mesh
[ -z "${DISTRIBUTED:-}" ] || over=--distributed
common=(--model "$model" --video "$video" --prompt "What happens in this video?" "$over" "$@")
record prefill-dense.json $MMI prefill "${common[@]}" --json
record prefill-sparse.json $MMI prefill "${common[@]}" --pattern Grid --json
