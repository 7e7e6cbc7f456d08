#!/usr/bin/env bash
# compute-sanitizer over Fathom on a GPU: the op tests, and three training steps of each kind of routing.
# Exit status: 0 clean, 1 findings or a failed test, 77 no GPU or no compute-sanitizer.
#
# Usage: scripts/sanitize-cuda.sh [--tools LIST] [--build DIR] [--logs DIR] [--filter GTEST_FILTER] [--ops | --train]
#   --tools LIST   default: memcheck,racecheck,initcheck,synccheck
#   --build DIR    where fathom and tests/ are; default build/cuda
#   --logs DIR     keeps each tool's whole output; default: a temporary folder
#   --filter F     which op tests; default *Cuda*
#   --ops          only the op tests;  --train  only the training steps
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

tools="memcheck,racecheck,initcheck,synccheck"
build="$ROOT/build/cuda"
logs=""
filter="*Cuda*"
ops=yes
train=yes
while (($#)); do
  case "$1" in
    --tools) tools="${2:?--tools needs a list}" && shift ;;
    --build) build="$(realpath "${2:?--build needs a folder}")" && shift ;;
    --logs) logs="${2:?--logs needs a folder}" && shift ;;
    --filter) filter="${2:?--filter needs a gtest filter}" && shift ;;
    --ops) train=no ;;
    --train) ops=no ;;
    -h | --help) print_help && exit 0 ;;
    *) usage_error "unknown argument $1." ;;
  esac
  shift
done
cd "$ROOT" || exit 1

if ! command -v compute-sanitizer >/dev/null; then
  say "sanitize-cuda: compute-sanitizer is not on the PATH (it comes with the CUDA Toolkit)"
  exit 77
fi
if ! nvidia-smi >/dev/null 2>&1; then
  say "sanitize-cuda: no GPU"
  exit 77
fi
[[ -x $build/fathom ]] || die "$build/fathom is missing: cmake --preset cuda && cmake --build --preset cuda"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
logs="${logs:-$work/logs}"
mkdir -p "$logs"

status=0
# run TOOL NAME COMMAND...: one line with the verdict; the end of the output where there is something to see.
run() {
  local tool="$1" name="$2" log="$logs/$1-$2.log" code=0 begin=$SECONDS
  shift 2
  local environment=(FATHOM_REQUIRE_GPU=1)
  # initcheck does not see what NVIDIA's libraries write with Hopper's bulk copies, and synccheck objects to a barrier
  # inside cuDNN's backward: there our own attention takes its place (docs/cuda.md).
  if [[ $tool == initcheck ]]; then environment+=(FATHOM_INITCHECK=1); fi
  if [[ $tool == initcheck || $tool == synccheck ]]; then environment+=(FATHOM_CUDNN=/nowhere); fi
  env "${environment[@]}" compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 "$@" >"$log" 2>&1 || code=$?
  local summary
  summary="$(grep -E '(ERROR|RACECHECK) SUMMARY' "$log" | tail -n 1 | sed 's/^=* *//')"
  if [[ $code == 0 && -n $summary ]]; then
    say "clean    $tool $name ($((SECONDS - begin)) s): $summary"
  else
    say "FINDINGS $tool $name (status $code, $((SECONDS - begin)) s): ${summary:-no summary}"
    grep -vE '^\[ +(RUN|OK) ' "$log" | tail -n 30
    status=1
  fi
}

if [[ $train == yes ]]; then
  "$build/fathom" data synthetic -o "$work/text.txt" >/dev/null
  "$build/fathom" data prepare "$work/text.txt" --valid-fraction 0.1 -o "$work/text.h5" >/dev/null
fi
# steps TOOL NAME CONFIG [--set ...]: three steps, an evaluation and a checkpoint.
steps() {
  local tool="$1" name="$2" config="$3"
  shift 3
  run "$tool" "train-$name" "$build/fathom" train "configs/$config" --device cuda --run-dir "$work/$tool-$name" \
    --set data.train="$work/text.h5" --set data.valid="$work/text.valid.h5" --set data.tokenizer= \
    --set model.vocab_size=0 --set train.target_flops=null --set train.steps=3 --set train.seq_len=256 \
    --set train.batch_tokens=2048 --set train.micro_batch=4 --set train.eval_every=3 --set train.eval_tokens=2048 \
    --set train.precision=bf16 "$@"
}

for tool in ${tools//,/ }; do
  if [[ $train == yes ]]; then
    steps "$tool" dense d2-dense.yaml
    steps "$tool" aux d2-mod.yaml --set routing.causal.method=aux
    steps "$tool" predictor d2-mod.yaml --set routing.causal.method=predictor
    steps "$tool" both-recompute d2-mod.yaml --set routing.causal.method=both --set train.recompute=block
    steps "$tool" stochastic d2-mod.yaml --set routing.selection=stochastic --set routing.causal.method=none
    steps "$tool" document-mask d2-mod.yaml --set data.document_mask=true --set routing.causal.method=predictor
    steps "$tool" fp32 d2-mod.yaml --set train.precision=fp32 --set routing.causal.method=predictor
  fi
  if [[ $ops == yes ]]; then
    run "$tool" kernels "$build/tests/test_kernels" --gtest_filter="$filter"
    run "$tool" ops "$build/tests/test_ops" --gtest_filter="$filter"
  fi
done
exit $status
