#!/usr/bin/env bash
# The house rules' check finds each thing that it is there to find.
# Usage: house_rules_can_fail.sh SCRATCH_FOLDER
set -euo pipefail
check="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/house_rules.sh"
scratch="$1"
rm -rf "$scratch"
mkdir -p "$scratch/src"

fresh() {
  rm -f "$scratch"/src/*
  printf '#pragma once\n#include "src/b.h"\n' >"$scratch/src/a.h"
}
expect() { # expect STATUS WORDS
  local out status=0
  out="$(bash "$check" "$scratch")" || status=$?
  if [[ $status != "$1" || $out != *"$2"* ]]; then
    echo "expected status $1 and '$2', got status $status and: $out"
    exit 1
  fi
}

fresh && expect 0 ""
fresh && printf '#include "../kernels/error.h"\n' >"$scratch/src/a.cpp" && expect 1 "a.cpp:1"
fresh && printf 'int x;\n' >"$scratch/src/b.h" && expect 1 "#pragma once"
fresh && yes '//' | head -n 601 >"$scratch/src/long.cpp" && expect 1 "601 lines"
rm -f "$scratch"/src/* && expect 2 "no source files"
