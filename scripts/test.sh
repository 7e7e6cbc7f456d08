#!/usr/bin/env bash
# Installs what is missing, builds, and runs every test. The last lines are ctest's.
#
# Usage: scripts/test.sh [--preset cpu|asan|tsan|cuda] [--label LABEL] [-j N]
#   --preset P   how to build (CMakePresets.json); default cpu
#   --label L    only the tests of one folder of tests/, such as io (a regular expression on ctest's labels)
#   -j N         parallel compilers and tests; default one a core, fewer where memory is short
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

preset=cpu
label=""
jobs="$(job_count)"
while (($#)); do
  case "$1" in
    --preset) preset="${2:?--preset needs a name}" && shift ;;
    --label) label="${2:?--label needs a name}" && shift ;;
    -j) jobs="${2:?-j needs a number}" && shift ;;
    -j*) jobs="${1#-j}" ;;
    -h | --help) print_help && exit 0 ;;
    *) usage_error "unknown option $1." ;;
  esac
  shift
done
case "$preset" in
  cpu | asan | tsan | cuda) ;;
  *) usage_error "--preset is '$preset'; it is one of cpu, asan, tsan, cuda." ;;
esac
[[ $jobs =~ ^[1-9][0-9]*$ ]] || usage_error "-j is '$jobs'; it is a number, at least 1."

"$ROOT/scripts/setup.sh"
cd "$ROOT"
cmake --preset "$preset"
cmake --build --preset "$preset" -j "$jobs"

# Tests share the cores: threads that wait must sleep.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
export UBSAN_OPTIONS="${UBSAN_OPTIONS:-print_stacktrace=1}"
arguments=(--preset "$preset" -j "$jobs")
if [[ -n $label ]]; then arguments+=(-L "$label"); fi
exec ctest "${arguments[@]}" --no-tests=error
