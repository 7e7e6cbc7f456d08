#!/usr/bin/env bash
# Installs the build, moves it elsewhere, and builds a program of another project against it.
# Usage: install_test.sh CMAKE SOURCE BUILD SCRATCH GENERATOR CXX SANITIZERS
set -euo pipefail
cmake="$1" source="$2" build="$3" scratch="$4" generator="$5" cxx="$6" sanitizers="$7"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
fail() {
  echo "$*"
  exit 1
}
if [[ -n $sanitizers ]]; then
  echo "skipped: a library built with sanitizers needs them in the consumer too"
  exit 77
fi

rm -rf "$scratch"
"$cmake" --install "$build" --prefix "$scratch/first" >/dev/null
mv "$scratch/first" "$scratch/moved"
prefix="$scratch/moved"
if grep -rlF -e "$source" -e "$build" "$prefix" --include='*.cmake' --include='*.yaml'; then
  fail "the files above name the folder they were built in"
fi
for file in share/man/man1/fathom.1 share/bash-completion/completions/fathom share/zsh/site-functions/_fathom \
  share/fish/vendor_completions.d/fathom.fish include/fathom/src/config/config.h include/fathom/kernels/error.h; do
  [[ -s $prefix/$file ]] || fail "$file is not installed"
done

"$cmake" -S "$here/consumer" -B "$scratch/consumer" -G "$generator" -DCMAKE_BUILD_TYPE=Release \
  -DCMAKE_CXX_COMPILER="$cxx" -DCMAKE_PREFIX_PATH="$prefix" >"$scratch/configure.log" 2>&1 ||
  { cat "$scratch/configure.log" && fail "the consumer does not configure"; }
"$cmake" --build "$scratch/consumer" >"$scratch/build.log" 2>&1 ||
  { cat "$scratch/build.log" && fail "the consumer does not build"; }

config="$prefix/share/fathom/configs/quickstart-mod.yaml"
printed="$("$scratch/consumer/consumer" "$config")"
planned="$("$prefix/bin/fathom" plan "$config" --vocab 4096 --json | grep -oE '"flops_per_token_train":[0-9.e+]+' | head -n 1)"
echo "consumer: $printed; fathom plan: $planned"
[[ -n $planned && $printed == "$planned" ]] || fail "the two differ"
