#!/usr/bin/env bash
# From nothing to a trained Mixture-of-Depths model beside its dense twin of equal training FLOPs, on the CPU:
# installs what is missing, builds, prepares text, trains both, compares them, and lets both write a few lines.
# What is done already is skipped, and an interrupted training goes on where it stopped, when called again.
#
# Usage: scripts/quickstart.sh [--quick] [--text FILE] [--out DIR]
#   --quick      smaller models and less text: under two minutes after the build (otherwise some eight) on two cores
#   --text FILE  text, or JSON lines with a "text" field, or either as .xz .gz .zst; default: Debian's dictionary
#                of English (package dict-gcide)
#   --out DIR    where everything goes; default quickstart/ beside this repository's README
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

quick=no
text=""
out="$ROOT/quickstart"
while (($#)); do
  case "$1" in
    --quick) quick=yes ;;
    --text) text="${2:?--text needs a file}" && shift ;;
    --out) out="${2:?--out needs a folder}" && shift ;;
    -h | --help) print_help && exit 0 ;;
    *) usage_error "unknown option $1." ;;
  esac
  shift
done

if [[ -n $text ]]; then
  [[ -f $text && -r $text ]] || die "--text $text is no readable file."
  text="$(realpath "$text")"
fi
mkdir -p "$out" || die "--out $out cannot be made. Give a folder that can be written."
out="$(realpath "$out")"
fathom="$ROOT/build/cpu/fathom"

# What the two sizes differ in. Each has a folder of its own; the text is shared.
if [[ $quick == yes ]]; then
  work="$out/quick"
  configs=quick
  vocabulary=2048 sample_mb=2 valid_fraction=0.05
else
  work="$out/full"
  configs=quickstart
  vocabulary=4096 sample_mb=8 valid_fraction=0.02
fi
mkdir -p "$work/.done"

# A stage is done when it ended well with the same command and the same results of the stages before it.
key_of() { printf '%s\0' "$@" | sha256sum | cut -c 1-16; }
is_done() { # is_done STAGE KEY OUTPUT
  [[ -e $3 && -f $work/.done/$1 && $(<"$work/.done/$1") == "$2" ]]
}
stage() { # stage STAGE KEY OUTPUT COMMAND...
  local name="$1" key="$2" output="$3"
  shift 3
  if is_done "$name" "$key" "$output"; then
    say "[$name] done already: $output"
    return
  fi
  say "[$name] ..."
  "$@" || die "[$name] failed; what went wrong is said above."
  echo "$key" >"$work/.done/$name"
}

train_run() { # train_run NAME CONFIG: to its end, or to where it was interrupted
  local name="$1" run="$work/$1"
  "$fathom" train "$2" --run-dir "$run" --resume auto --set data.train="$store" --set data.valid="$valid" \
    --set data.tokenizer="$tokenizer" || return 1
  # What it cost, for the report.
  "$fathom" plan "$2" --json --set data.train="$store" >"$run/plan.json.part" && mv "$run/plan.json.part" "$run/plan.json" || return 1
  if ! tail -n 1 "$run/metrics.jsonl" | grep -Eq '"status": *"done"'; then
    die "[$name] stopped before its end. Call the same command again to go on where it stopped."
  fi
}

write_samples() { # write_samples RUN: a few lines in RUN/samples.txt
  "$fathom" generate "$1" -p "$prompt" -n 80 --temperature 0.8 --top-p 0.95 --seed 1 >"$1/samples.txt.part" &&
    mv "$1/samples.txt.part" "$1/samples.txt"
}

every_eighth_entry() { awk 'NR % 8 == 1' "$1" >"$2.part" && mv "$2.part" "$2"; }

say "[setup] ..."
"$ROOT/scripts/setup.sh" || die "[setup] failed; what went wrong is said above."

say "[build] ..."
(cd "$ROOT" && cmake --preset cpu >"$work/configure.log" 2>&1) ||
  { tail -n 20 "$work/configure.log" >&2 && die "[build] cmake failed; its last lines are above, all of them in $work/configure.log."; }
(cd "$ROOT" && cmake --build --preset cpu --target fathom -j "$(job_count)") || die "[build] failed; what went wrong is said above."
built_after=$SECONDS

# The text, its tokenizer and its tokens.
prompt="The "
if [[ -z $text ]]; then
  text="$out/gcide.jsonl"
  prompt='Lantern \Lan"tern\, n.'
  if [[ -s $text ]]; then
    say "[text] done already: $text"
  else
    say "[text] ..."
    "$ROOT/data/gcide.sh" "$text" || die "[text] failed; what went wrong is said above. Another text: --text FILE."
  fi
  if [[ $quick == yes ]]; then
    stage sample "$(key_of "$text" "$(stat -c '%s %Y' "$text")")" "$work/text.jsonl" every_eighth_entry "$text" "$work/text.jsonl"
    text="$work/text.jsonl"
  fi
fi

tokenizer="$work/bpe.model"
store="$work/train.h5"
valid="$work/train.valid.h5"
text_key="$(key_of "$text" "$(stat -c '%s %Y' "$text")")"
tokenizer_key="$(key_of "$text_key" "$vocabulary" "$sample_mb")"
store_key="$(key_of "$tokenizer_key" "$valid_fraction")"
if [[ -f $work/.done/data && $(<"$work/.done/data") != "$store_key" && (-e $work/dense || -e $work/mod) ]]; then
  die "$work holds models that were trained on another text. Give another --out, or remove that folder."
fi
stage tokenizer "$tokenizer_key" "$tokenizer" \
  "$fathom" tokenizer train "$text" --vocab "$vocabulary" --sample-mb "$sample_mb" -o "$tokenizer"
stage data "$store_key" "$valid" \
  "$fathom" data prepare "$text" --tokenizer "$tokenizer" --valid-fraction "$valid_fraction" -o "$store"

# Two models, one budget.
for name in dense mod; do
  config="$ROOT/configs/$configs-$name.yaml"
  stage "$name" "$(key_of "$store_key" "$(<"$config")")" "$work/$name/metrics.jsonl" train_run "$name" "$config"
done
for name in dense mod; do
  stage "samples-$name" "$(key_of "$(<"$work/.done/$name")" "$prompt")" "$work/$name/samples.txt" write_samples "$work/$name"
done

say "[report] ..."
"$fathom" report "$work/dense" "$work/mod" -o "$work/report.html" || die "[report] failed; what went wrong is said above."
for name in dense mod; do
  say ""
  say "--- $name writes ---"
  cat "$work/$name/samples.txt"
done
say ""
say "report: $work/report.html"
say "runs:   $work/dense and $work/mod; go on with: build/cpu/fathom generate $work/mod -p TEXT"
say "time:   $((SECONDS - built_after)) s after the build"
