#!/usr/bin/env bash
# Puts each bug of known_bugs_test.cpp into a copy of the engine and checks that the test of its name fails.
#
#   tests/model/mutations.sh [BUG...]      all of mutations/*.patch by default
#
# The copy is built in build/mutations, once in full and then what each patch touches. Not part of ctest, as
# it rebuilds. A name after a dot (NAME.part.patch) is another way to put the bug of test NAME in.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
work=$root/build/mutations
copy=$work/source
export OMP_WAIT_POLICY=passive
mkdir -p "$copy"

# Copies what differs and keeps times of what does not, so that the build stays incremental.
restore() {
  find "$copy" -type f -printf '%P\0' | while IFS= read -r -d '' file; do
    [[ -f $file ]] || rm "$copy/$file"
  done
  git ls-files --cached --others --exclude-standard -z | while IFS= read -r -d '' file; do
    [[ -f $file ]] || continue
    cmp -s "$file" "$copy/$file" && continue
    mkdir -p "$copy/$(dirname "$file")"
    cp "$file" "$copy/$file"
  done
}

build() { cmake --build "$work/build" --parallel 2 --target test_model > "$work/build.log" 2>&1; }
passes() { "$work/build/tests/test_model" --gtest_brief=1 --gtest_filter="KnownBugs.$1" > "$work/test.log" 2>&1; }

restore
cmake -S "$copy" -B "$work/build" -G Ninja -DCMAKE_BUILD_TYPE=Release > "$work/configure.log"
build || { tail -20 "$work/build.log"; exit 1; }
passes '*' || { echo "the tests fail without any bug:"; tail -20 "$work/test.log"; exit 1; }

bugs=("$@")
if ((${#bugs[@]} == 0)); then
  for file in tests/model/mutations/*.patch; do bugs+=("$(basename "$file" .patch)"); done
fi
missed=0
for bug in "${bugs[@]}"; do
  patch --silent --fuzz=0 -d "$copy" -p1 < "tests/model/mutations/$bug.patch"
  if ! build; then
    echo "BROKEN  $bug: does not build"
    tail -20 "$work/build.log"
    missed=1
  elif passes "${bug%%.*}"; then
    echo "MISSED  $bug"
    missed=1
  else
    echo "caught  $bug: $(grep -c '^\[  FAILED  \]\|Failure$' "$work/test.log") failures"
  fi
  restore
done
exit $missed
