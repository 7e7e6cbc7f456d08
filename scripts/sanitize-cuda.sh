#!/usr/bin/env bash
# compute-sanitizer over Fathom on a GPU: the op tests, and three training steps of each kind of routing.
# Exit status: 0 clean, 1 findings or a failed test, 77 no GPU or no compute-sanitizer.
#
# Usage: scripts/sanitize-cuda.sh [--tools LIST] [--kinds LIST] [--filter GTEST_FILTER] [--build DIR] [--logs DIR] [--ops | --train]
#        scripts/sanitize-cuda.sh --judge LOG
#   --tools LIST   default: memcheck,racecheck,initcheck,synccheck
#   --kinds LIST   which trainings; default: dense,aux,predictor,both-recompute,stochastic,document-mask,fp32,
#                  moe,moe-token,moe-dropless,mode-staged,mode-integrated
#   --build DIR    where fathom and tests/ are; default build/cuda
#   --logs DIR     keeps each tool's whole output; default: a temporary folder
#   --filter F     which op tests; default *Cuda*
#   --ops          only the op tests;  --train  only the training steps
#   --judge LOG    runs nothing, needs no GPU: the verdict on a log of racecheck's, exit status 0 or 1
#
# The op tests one after the other take long under racecheck. GTEST_TOTAL_SHARDS=N and GTEST_SHARD_INDEX=0..N-1 in the
# environment are gtest's own: each of N calls, side by side on one GPU with a --logs of its own, runs its share of them.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

tools="memcheck,racecheck,initcheck,synccheck"
kinds="dense,aux,predictor,both-recompute,stochastic,document-mask,fp32,moe,moe-token,moe-dropless,mode-staged,mode-integrated"
build="$ROOT/build/cuda"
logs=""
filter="*Cuda*"
judged=""
ops=yes
train=yes
while (($#)); do
  case "$1" in
    --tools) tools="${2:?--tools needs a list}" && shift ;;
    --kinds) kinds="${2:?--kinds needs a list}" && shift ;;
    --build) build="$(realpath "${2:?--build needs a folder}")" && shift ;;
    --logs) logs="$(realpath -m "${2:?--logs needs a folder}")" && shift ;;
    --filter) filter="${2:?--filter needs a gtest filter}" && shift ;;
    --judge) judged="${2:?--judge needs a log}" && shift ;;
    --ops) train=no ;;
    --train) ops=no ;;
    -h | --help) print_help && exit 0 ;;
    *) usage_error "unknown argument $1." ;;
  esac
  shift
done

print_limit=100000
# only_in_libraries LOG: racecheck takes the pipelines that bulk copies fill in cuBLASLt's and cuDNN's Hopper kernels for
# races. True when it found those and nothing else, printed them all, and the program itself ended well.
only_in_libraries() {
  local printed
  printed="$(grep -c 'Race reported' "$1")"
  # One reader of the whole log: a `grep -q` behind another grep ends at its first line, and what the other one's broken
  # pipe says of the pipeline hides a hazard.
  [[ $printed -gt 0 && $printed -lt $print_limit ]] && ! grep -qE 'Target application returned an error|Internal Sanitizer Error' "$1" &&
    awk '(/Race reported between/ || /^=+ +and (Read|Write|Atomic)/ || /^=+ +(Warning|Error):/) &&
         !/ at (nvjet_|cudnn_generated_)/ { ours = 1 } END { exit ours }' "$1"
}
if [[ -n $judged ]]; then
  [[ -r $judged ]] || die "cannot read $judged."
  if only_in_libraries "$judged"; then
    say "clean    $judged: no hazard in Fathom's kernels ($(grep -c 'Race reported' "$judged") inside cuBLASLt's and cuDNN's)"
    exit 0
  fi
  say "FINDINGS $judged"
  exit 1
fi

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
runs=0
# run TOOL NAME COMMAND...: one line with the verdict; the end of the output where there is something to see.
run() {
  local tool="$1" name="$2" log="$logs/$1-$2.log" code=0 begin=$SECONDS
  shift 2
  runs=$((runs + 1))
  local environment=(FATHOM_REQUIRE_GPU=1)
  # initcheck does not see what NVIDIA's libraries write with Hopper's bulk copies, and synccheck objects to a barrier
  # inside cuDNN's backward (docs/cuda.md). Ops are checked without cuDNN, so that our own attention is.
  if [[ $tool == initcheck ]]; then environment+=(FATHOM_INITCHECK=1); fi
  # racecheck keeps what it saw of every launch in the host's memory until somebody waits for it: 126 GB in two steps of one
  # training. Its own option waits behind each launch; with the variable alone, which has steps go op by op, it grows.
  local options=()
  if [[ $tool == racecheck ]]; then
    environment+=(CUDA_LAUNCH_BLOCKING=1)
    options+=(--force-blocking-launches)
  fi
  # What is looked for inside a block of threads is looked for in Fathom's kernels: NVIDIA's products took most of the
  # time, and nothing that was found in them counted. But racecheck of CUDA 13.0 ends in some products of cuBLASLt's when it
  # is to leave them out, of trainings in the first one: there it looks at all kernels, and where else it ended so, again.
  local of_ours=(--kernel-name kns=fathom)
  if [[ $tool == racecheck && $name == train* || $tool != racecheck && $tool != synccheck ]]; then of_ours=(); fi
  if [[ $tool == initcheck || $tool == synccheck || $name == ops* ]]; then environment+=(FATHOM_CUDNN=/nowhere); fi
  local check=(env "${environment[@]}" compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit "$print_limit" "${options[@]}")
  "${check[@]}" "${of_ours[@]}" "$@" >"$log" 2>&1 || code=$?
  if [[ $code != 0 && ${#of_ours[@]} -gt 0 ]] && grep -q 'Internal Sanitizer Error' "$log"; then
    code=0
    "${check[@]}" "$@" >"$log" 2>&1 || code=$?
  fi
  local summary took=$((SECONDS - begin)) inside=0
  summary="$(sed -nE 's/^=* *((ERROR|RACECHECK) SUMMARY.*)/\1/p' "$log" | tail -n 1)"
  if [[ $code == 9 && $tool == racecheck ]] && only_in_libraries "$log"; then
    inside="$(grep -c 'Race reported' "$log")"
    code=0
  fi
  if [[ $code == 0 && $inside -gt 0 ]]; then
    say "clean    $tool $name ($took s): no hazard in Fathom's kernels ($inside inside cuBLASLt's and cuDNN's)"
  elif [[ $code == 0 && -n $summary ]]; then
    say "clean    $tool $name ($took s): $summary"
  elif grep -q 'terminated before first instrumented API call' "$log" && grep -q '^\[  PASSED' "$log"; then
    say "clean    $tool $name ($took s): nothing was launched"
  else
    say "FINDINGS $tool $name (status $code, $took s): ${summary:-no summary}"
    grep -vE '^\[ +(RUN|OK) |nvjet_|cudnn_generated' "$log" | tail -n 30
    status=1
  fi
}

if [[ $train == yes ]]; then
  "$build/fathom" data synthetic -o "$work/text.txt" >/dev/null
  "$build/fathom" data prepare "$work/text.txt" --valid-fraction 0.1 -o "$work/text.h5" >/dev/null
fi
# settings_of KIND: what makes a training one of this kind, a setting a line.
settings_of() {
  case "$1" in
    dense) ;;
    aux) echo routing.causal.method=aux ;;
    predictor) echo routing.causal.method=predictor ;;
    both-recompute) printf '%s\n' routing.causal.method=both train.recompute=block ;;
    stochastic) printf '%s\n' routing.selection=stochastic routing.causal.method=none ;;
    document-mask) printf '%s\n' routing.causal.method=predictor data.document_mask=true ;;
    fp32) printf '%s\n' routing.causal.method=predictor train.precision=fp32 ;;
    moe) printf '%s\n' routing.kind=moe routing.causal.method=predictor experts.count=4 ;;
    moe-token) printf '%s\n' routing.kind=moe routing.causal.method=none experts.count=4 experts.choice=token ;;
    moe-dropless) printf '%s\n' routing.kind=moe routing.causal.method=none experts.count=4 experts.choice=token experts.capacity_factor=0 ;;
    mode-staged) printf '%s\n' routing.kind=mode_staged routing.causal.method=predictor experts.count=4 ;;
    mode-integrated) printf '%s\n' routing.kind=mode_integrated routing.causal.method=both experts.count=4 experts.noop=4 experts.capacity_factor=0.5 ;;
    *) usage_error "unknown kind of training $1." ;;
  esac
}
# A product's algorithm is chosen by timing its candidates. Under racecheck that is most of the time, and NVIDIA's
# kernels only: both below make the choices beforehand, and racecheck finds them on disk.
# Under racecheck a training has two blocks, one of them routed.
# steps TOOL KIND: three steps, an evaluation and a checkpoint, of few tokens.
steps() {
  local tool="$1" kind="$2" config=d2-mod.yaml settings
  if [[ $kind == dense ]]; then config=d2-dense.yaml; fi
  mapfile -t settings < <(settings_of "$kind")
  settings=(data.train="$work/text.h5" data.valid="$work/text.valid.h5" data.tokenizer= model.vocab_size=0
    train.target_flops=null train.steps=3 train.seq_len=128 train.batch_tokens=256 train.micro_batch=1 train.eval_every=3
    train.eval_tokens=256 train.precision=bf16 "${settings[@]}")
  local command=("$build/fathom" train "configs/$config" --device cuda "${settings[@]/#/--set=}")
  if [[ $tool == racecheck ]]; then
    command+=(--set=model.depth=2)
    "${command[@]}" --run-dir "$work/choices-$kind" >/dev/null 2>&1 || true
  fi
  run "$tool" "train-$kind" "${command[@]}" --run-dir "$work/$tool-$kind"
}

for tool in ${tools//,/ }; do
  case "$tool" in
    memcheck | racecheck | initcheck | synccheck) ;;
    *) usage_error "unknown tool $tool." ;;
  esac
done
for kind in ${kinds//,/ }; do settings_of "$kind" >/dev/null; done
if [[ $ops == yes ]]; then
  for name in kernels ops; do [[ -x $build/tests/test_$name ]] || die "$build/tests/test_$name is missing: build the preset cuda."; done
fi
for tool in ${tools//,/ }; do
  if [[ $train == yes ]]; then
    for kind in ${kinds//,/ }; do steps "$tool" "$kind"; done
  fi
  if [[ $ops == yes ]]; then
    for name in kernels ops; do
      test="$build/tests/test_$name"
      # A filter may be for one of the two only. The whole list first: grep -q ends at its first line, and a test
      # program that still writes then fails with the pipe.
      listed="$("$test" --gtest_list_tests --gtest_filter="$filter")"
      if grep -q '^ ' <<<"$listed"; then
        if [[ $tool == racecheck ]]; then "$test" --gtest_filter="$filter" >/dev/null 2>&1 || true; fi
        run "$tool" "$name" "$test" --gtest_filter="$filter"
      fi
    done
  fi
done
if ((runs == 0)); then die "nothing ran: no test matches '$filter'."; fi
exit $status
