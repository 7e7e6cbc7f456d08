#!/usr/bin/env bash
# Speculative decoding on trained models: trains a target of a long context, dense and Mixture-of-Depths, and a
# small draft of the same tokenizer (configs/long-*.yaml, some three minutes on an H200), and measures acceptance
# and speed on text that they were not trained on. Lines of JSON go to OUT/measured.jsonl. What is trained
# already is not trained again.
#
# Usage: scripts/speculation.sh --store STORE --tokenizer MODEL --text FILE [--out DIR] [--device D] [--fathom F]
#   --store STORE      token store to train on (fathom data prepare), of a vocabulary of 4096
#   --tokenizer MODEL  the tokenizer that made it
#   --text FILE        plain text of other books, some 100 kB at least
#   --out DIR          where runs go; default runs/speculation
#   --device D         default: cuda
#   --fathom F         the program; default: build/cuda/fathom
#   --set KEY=VALUE    of all three configs; repeatable
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

store="" tokenizer="" text="" out="$ROOT/runs/speculation" device=cuda fathom="$ROOT/build/cuda/fathom"
settings=()
while (($#)); do
  case "$1" in
    --store) store="${2:?--store needs a file}" && shift ;;
    --tokenizer) tokenizer="${2:?--tokenizer needs a file}" && shift ;;
    --text) text="${2:?--text needs a file}" && shift ;;
    --out) out="${2:?--out needs a folder}" && shift ;;
    --device) device="${2:?--device needs a name}" && shift ;;
    --fathom) fathom="${2:?--fathom needs a program}" && shift ;;
    --set) settings+=(--set "${2:?--set needs KEY=VALUE}") && shift ;;
    -h | --help) print_help && exit 0 ;;
    *) usage_error "unknown option $1." ;;
  esac
  shift
done
for file in store tokenizer text; do
  [[ -f ${!file} && -r ${!file} ]] || usage_error "--$file '${!file}' is no readable file."
done
[[ -x $fathom ]] || die "There is no $fathom. Build it, or give --fathom."
mkdir -p "$out" || die "--out $out cannot be made. Give a folder that can be written."

for name in long-dense long-mod long-draft; do
  say "[$name] ..."
  "$fathom" train "$ROOT/configs/$name.yaml" --run-dir "$out/$name" --device "$device" --set data.train="$store" \
    --set data.tokenizer="$tokenizer" "${settings[@]}" --json > "$out/$name.json" ||
    die "[$name] failed; what went wrong is said above."
done

: > "$out/measured.jsonl"
measure() { # measure MODEL ARGUMENTS...
  say "[measure] $*"
  "$fathom" bench speculative "$out/$1" --text "$text" --device "$device" --json "${@:2}" >> "$out/measured.jsonl" ||
    die "[measure] failed; what went wrong is said above."
}
common=(--context "1024,3072" --tokens 256 --texts 8 --retrieval-budget 256 --gamma 6)
for temperature in 0 0.6 1; do
  measure long-dense "${common[@]}" --temperature "$temperature" --draft "$out/long-draft"
  measure long-mod "${common[@]}" --temperature "$temperature" --draft "$out/long-draft"
  measure long-mod "${common[@]}" --temperature "$temperature" --draft self-skip --speculate draft,triforce
done
say "Lines: $out/measured.jsonl"
