#!/usr/bin/env bash
# scripts/sanitize-cuda.sh tells hazards in Fathom's kernels from those inside NVIDIA's libraries, in logs longer than a pipe holds.
# Usage: sanitize_log_test.sh SOURCE_FOLDER
set -euo pipefail
script="$1/scripts/sanitize-cuda.sh"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

hazards() { # hazards KERNEL COUNT: as racecheck prints them
  yes "========= Error: Race reported between Write access at $1(float *)+0x4a0
=========     and Read access at $1(float *)+0x5c0 [1024 hazards]
=========" | head -n "$((3 * $2))" || true # the end of the pipe stops yes
}
expect() { # expect VERDICT LOG
  local said status=0
  said="$(bash "$script" --judge "$2" 2>&1)" || status=$?
  case "$1" in
    clean) [[ $status == 0 && $said == clean* ]] ;;
    findings) [[ $status == 1 && $said == FINDINGS* ]] ;;
  esac || { echo "$(basename "$2"): status $status, '$said', expected $1" && exit 1; }
}

{ hazards nvjet_hsh_128x256 4000 && hazards cudnn_generated_fort_native_sdpa 2000; } >"$work/libraries"
[[ $(wc -c <"$work/libraries") -gt 1000000 ]]
expect clean "$work/libraries"
{ hazards fathom::cuda::swiglu_kernel 1 && cat "$work/libraries"; } >"$work/first"
expect findings "$work/first"
{ cat "$work/libraries" && hazards fathom::cuda::swiglu_kernel 1; } >"$work/last"
expect findings "$work/last"
# One side of a race is enough.
{ sed '2s/nvjet_hsh_128x256/fathom::cuda::swiglu_kernel/' "$work/libraries"; } >"$work/one-side"
expect findings "$work/one-side"
{ cat "$work/libraries" && echo '========= Target application returned an error'; } >"$work/failed"
expect findings "$work/failed"
: >"$work/empty"
expect findings "$work/empty"
