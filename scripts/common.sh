# What every script here starts with: the repository's root, messages, and how many jobs this machine can bear.
# To be sourced: . "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck shell=bash
set -euo pipefail

# shellcheck disable=SC2034  # used by the scripts that source this file
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

say() { printf '%s\n' "$*"; }
die() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 1
}
usage_error() {
  printf '%s: %s See %s --help.\n' "$(basename "$0")" "$*" "$(basename "$0")" >&2
  exit 2
}

# The comment at the top of the calling script, which is its help.
print_help() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; }

# One compiler a core, and no more than the memory bears: some 1.5 GiB each.
job_count() {
  local cores memory_kib jobs
  cores="$(nproc 2>/dev/null || echo 2)"
  memory_kib="$(awk '/^MemAvailable:/ { print $2 }' /proc/meminfo 2>/dev/null || echo 0)"
  jobs=$((${memory_kib:-0} / 1572864))
  if ((jobs < 1)); then jobs=1; fi
  if ((jobs > cores)); then jobs="$cores"; fi
  echo "$jobs"
}

# The path of an nvcc that can compile us (CUDA 12.4 or later), or nothing.
find_nvcc() {
  local nvcc version
  for nvcc in "${CUDACXX:-}" "$(command -v nvcc || true)" /usr/local/cuda/bin/nvcc; do
    if [[ -z $nvcc || ! -x $nvcc ]]; then continue; fi
    version="$("$nvcc" --version | sed -n 's/.*release \([0-9]*\)\.\([0-9]*\).*/\1 \2/p')"
    if ((${version% *} * 100 + ${version#* } >= 1204)); then
      echo "$nvcc"
      return
    fi
  done
}
