#!/usr/bin/env bash
# House rules that a compiler does not see: includes name a room, headers guard themselves, files stay short.
# Usage: house_rules.sh SOURCE_FOLDER
set -uo pipefail
cd "$1" || exit 2
longest=600
broken=0

rooms=()
for room in kernels src train infer serve app tests bench; do
  if [[ -d $room ]]; then rooms+=("$room"); fi
done
mapfile -d '' files < <(find "${rooms[@]}" -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) -print0)
if ((${#files[@]} == 0)); then
  echo "no source files under $1"
  exit 2
fi

rule() { # rule TEXT: reports the lines on standard input as breaking it
  local line
  while IFS= read -r line; do
    echo "$line: $1"
    broken=1
  done
}

rule 'includes are "room/path.h", not relative' < <(grep -nE '^[[:space:]]*#[[:space:]]*include[[:space:]]*"\.\.?/' "${files[@]}" /dev/null)
for file in "${files[@]}"; do
  if [[ $file == *.h || $file == *.cuh ]] && ! grep -qx '#pragma once' "$file"; then
    rule 'a header starts with #pragma once' <<<"$file"
  fi
  lines="$(wc -l <"$file")"
  if ((lines > longest)); then rule "$lines lines; a file holds one idea in at most $longest" <<<"$file"; fi
done
exit "$broken"
