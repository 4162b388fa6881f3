# What the scripts share: where results go, and how a command runs. Sourced, not run.
# RESULTS=DIRECTORY names where results go, out/tpu by default; DRY_RUN=1 prints every command and runs none;
# PLATFORM=cpu installs nothing and runs the small parts on a CPU. RESULTS is relative to the repository.
set -euo pipefail
STARTED_IN=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
RESULTS=${RESULTS:-out/tpu}
PLATFORM=${PLATFORM:-tpu}
MMI=".venv/bin/python -m mmi_jax.cli"

run() {
  echo "+$(printf ' %q' "$@")"
  [ -n "${DRY_RUN:-}" ] || "$@"
}

# A file or directory as given, found from where the script was started.
from_start() {
  case "$1" in
    /*) echo "$1" ;;
    *) if [ -e "$STARTED_IN/$1" ]; then echo "$STARTED_IN/$1"; else echo "$1"; fi ;;
  esac
}

# The library with the TPU runtime, once per machine; and what is there, in the results.
prepare() {
  [ "$PLATFORM" = cpu ] || run make .venv/.installed-tpu
  run mkdir -p "$RESULTS"
  record doctor.txt $MMI doctor
}

# record FILE COMMAND...: runs the command and keeps what it prints; a failure keeps its file, and ends the script.
record() {
  local file="$RESULTS/$1"
  shift
  echo "+$(printf ' %q' "$@") | tee $file"
  [ -n "${DRY_RUN:-}" ] || "$@" | tee "$file"
}
