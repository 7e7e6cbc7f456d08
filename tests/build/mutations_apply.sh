#!/usr/bin/env bash
# Every bug of tests/model/mutations can still be put in. Whether its test catches it is mutations.sh's to say, which
# rebuilds; this says at every run that the patches followed the code. Lines may have moved, their neighbours may not
# have changed: a patch that applies to others (patch calls it fuzz) may put the bug where it does nothing.
set -euo pipefail
cd "$(dirname "$0")/../.."
command -v patch >/dev/null || { echo "there is no patch on this machine" && exit 77; }
failed=0
for file in tests/model/mutations/*.patch; do
  patch --dry-run --silent --force --fuzz=0 -p1 <"$file" >/dev/null && continue
  echo "$file does not apply any more"
  failed=1
done
exit "$failed"
