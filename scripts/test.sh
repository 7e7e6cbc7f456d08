#!/usr/bin/env bash
# Installs what is missing, builds, and runs every test. The last lines are ctest's.
# The preset cpu, where an nvcc of CUDA 12.4 or later is found, also compiles the CUDA side, with the programs and tests
# that use it (build/cuda-check), and runs those tests where there is a GPU.
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

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU '; }

# Compiles what a CPU build leaves out. Its folder has the CPU backend for one instruction set only, to be done sooner.
check_cuda() {
  local folder="$ROOT/build/cuda-check" cudnn=ON rooms
  CUDACXX="$(find_nvcc)"
  if [[ -z $CUDACXX ]]; then
    say "cuda: there is no nvcc of CUDA 12.4 or later here, so the CUDA side is not compiled"
    return
  fi
  export CUDACXX
  if ! "$ROOT/scripts/setup-cuda.sh"; then
    say "cuda: going on without cudnn_attention.cpp, whose headers are missing (above)"
    cudnn=OFF
  fi
  if ! "$ROOT/scripts/setup-cuda.sh" --cutlass; then
    say "cuda: going on without codes_gemm.cu, whose headers (CUTLASS) could not be fetched (above)"
  fi
  # The folders of tests/ that know devices.
  mapfile -t rooms < <(grep -rl --include='*.cpp' --include='*.h' '"tests/devices.h"' tests | cut -d / -f 2 | sort -u)
  # Most host code is the same as the cpu build's, so that ccache has it by now.
  cmake --preset cuda -B "$folder" -DFATHOM_CPU_ISAS=portable -DFATHOM_CUDNN_ATTENTION="$cudnn"
  cmake --build "$folder" -j "$jobs" --target fathom_kernels_cuda fathom "${rooms[@]/#/test_}"
  if has_gpu; then
    FATHOM_REQUIRE_GPU=1 ctest --test-dir "$folder" -L "^($(IFS='|' && echo "${rooms[*]}"))\$" --output-on-failure
  else
    say "cuda: compiled; the tests that need a GPU are skipped, since there is none here (nvidia-smi -L lists none)"
  fi
}

"$ROOT/scripts/setup.sh"
cd "$ROOT"
if [[ $preset == cuda ]]; then
  CUDACXX="$(find_nvcc)"
  [[ -n $CUDACXX ]] || die "the preset cuda needs an nvcc of CUDA 12.4 or later; scripts/setup-cuda.sh says where to get it."
  export CUDACXX
  "$ROOT/scripts/setup-cuda.sh" || die "the preset cuda needs what is listed above."
  has_gpu || say "cuda: there is no GPU here, so the tests that need one will be skipped"
fi
cmake --preset "$preset"
cmake --build --preset "$preset" -j "$jobs"

# Tests share the cores: threads that wait must sleep.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
export UBSAN_OPTIONS="${UBSAN_OPTIONS:-print_stacktrace=1}"
if [[ $preset == cpu && -z $label ]]; then check_cuda; fi
arguments=(--preset "$preset" -j "$jobs")
if [[ -n $label ]]; then arguments+=(-L "$label"); fi
exec ctest "${arguments[@]}" --no-tests=error
