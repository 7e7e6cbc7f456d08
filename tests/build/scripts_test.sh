#!/usr/bin/env bash
# The scripts are valid, explain themselves, and refuse what they do not know with exit status 2.
# Usage: scripts_test.sh SOURCE_FOLDER
set -euo pipefail
cd "$1"
for script in scripts/*.sh data/*.sh; do
  [[ -e $script ]] || continue
  bash -n "$script"
  if [[ $script == scripts/common.sh || $script == data/* ]]; then continue; fi
  bash "$script" --help | grep -q '^Usage: ' || { echo "$script --help says nothing" && exit 1; }
  status=0
  message="$(bash "$script" --no-such-option 2>&1)" || status=$?
  if [[ $status != 2 || $message != *--no-such-option* ]]; then
    echo "$script --no-such-option: status $status, '$message'"
    exit 1
  fi
done
[[ -x .ci/run && -x scripts/setup.sh && -x scripts/test.sh && -x scripts/quickstart.sh ]] || { echo "not executable" && exit 1; }
