#!/usr/bin/env bash
# clang-format and clang-tidy over our sources. Exit status: 0 clean, 1 findings, 77 nothing could be checked.
#
# Usage: scripts/lint.sh [--format | --tidy] [--fix] [--changed [REF]] [-j N] [FILE...]
#   --format     only clang-format
#   --tidy       only clang-tidy, which needs a configured build/cpu (cmake --preset cpu)
#   --fix        let clang-format rewrite the files
#   --changed    only files that differ from REF (default: main), new ones too
#   -j N         clang-tidy processes; default 2
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# Other versions lay some lines out differently, so only this one judges.
format_version=14
do_format=yes
do_tidy=yes
fix=no
jobs=2
since=""
files=()
while (($#)); do
  case "$1" in
    --format) do_tidy=no ;;
    --tidy) do_format=no ;;
    --fix) fix=yes ;;
    --changed)
      since=main
      if [[ ${2:-} != "" && ${2:-} != -* ]]; then since="$2" && shift; fi
      ;;
    -j) jobs="${2:?-j needs a number}" && shift ;;
    -h | --help) print_help && exit 0 ;;
    -*) usage_error "unknown option $1." ;;
    *) files+=("$(realpath --relative-to="$ROOT" "$1")") ;;
  esac
  shift
done
cd "$ROOT"

if [[ -n $since ]]; then
  mapfile -t files < <({ git diff --name-only --diff-filter=d "$since" -- && git ls-files --others --exclude-standard; } |
    grep -E '\.(cpp|h|cu)$' | sort -u)
elif ((${#files[@]} == 0)); then
  mapfile -t files < <(find kernels src train infer serve app tests bench -name '*.cpp' -o -name '*.h' -o -name '*.cu' | sort)
fi
if ((${#files[@]} == 0)); then
  say "lint: no files to check"
  exit 0
fi

status=0
checked=no
if [[ $do_format == yes ]]; then
  formatter=""
  for candidate in "clang-format-$format_version" clang-format; do
    if "$candidate" --version 2>/dev/null | grep -q "version $format_version\."; then
      formatter="$candidate"
      break
    fi
  done
  if [[ -z $formatter ]]; then
    say "lint: clang-format $format_version is not installed, so the format was not checked"
  elif [[ $fix == yes ]]; then
    checked=yes
    "$formatter" -i "${files[@]}"
  else
    checked=yes
    "$formatter" --dry-run --Werror "${files[@]}" || status=1
  fi
fi

if [[ $do_tidy == yes ]]; then
  database="build/cpu/compile_commands.json"
  mapfile -t sources < <(printf '%s\n' "${files[@]}" | grep '\.cpp$' || true)
  if ! command -v clang-tidy >/dev/null; then
    say "lint: clang-tidy is not installed, so it was not run (scripts/setup.sh --dev)"
  elif [[ ! -f $database ]]; then
    say "lint: $database is missing, so clang-tidy was not run (cmake --preset cpu)"
  elif ((${#sources[@]})); then
    checked=yes
    # Without the options that only gcc knows.
    mkdir -p build/lint
    sed -E 's/ (-Wno-(restrict|maybe-uninitialized)|--param=[^ "]*)//g' "$database" >build/lint/compile_commands.json
    printf '%s\0' "${sources[@]}" | xargs -0 -n 1 -P "$jobs" clang-tidy -p build/lint --quiet || status=1
  fi
fi
if [[ $checked == no ]]; then exit 77; fi
if [[ $status == 0 ]]; then say "lint: clean (${#files[@]} files)"; fi
exit "$status"
