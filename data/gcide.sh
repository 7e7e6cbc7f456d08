#!/bin/sh
# The Collaborative International Dictionary of English (Debian's package dict-gcide, GPL) as JSON lines, an entry a line:
# 40 MB of English text on any Debian or Ubuntu, without a download from elsewhere.
#
#   data/gcide.sh [OUT]        OUT: gcide.jsonl
set -eu

out=${1:-gcide.jsonl}
dictionary=/usr/share/dictd/gcide.dict.dz

if [ "$out" = "-h" ] || [ "$out" = "--help" ]; then
  sed -n '2,5s/^# \{0,1\}//p' "$0"
  exit 0
fi
if [ -s "$out" ]; then
  echo "$out is there already; remove it to make it anew." >&2
  exit 0
fi

if [ ! -r "$dictionary" ]; then
  if ! command -v apt-get >/dev/null; then
    echo "gcide.sh: $dictionary is missing and there is no apt-get. Use a text of your own instead." >&2
    exit 1
  fi
  as_root=
  [ "$(id -u)" = 0 ] || as_root=sudo
  echo "installing dict-gcide" >&2
  # Without its recommendations: the dictionary server is not needed.
  $as_root apt-get install -y --no-install-recommends dict-gcide >&2 || {
    $as_root apt-get update >&2
    $as_root apt-get install -y --no-install-recommends dict-gcide >&2
  }
fi

part="$out.part"
trap 'rm -f "$part" "$part.text"' EXIT
# A .dz file is a gzip file. A few stray bytes are not UTF-8; iconv -c drops them, and says so with its exit status.
zcat -f <"$dictionary" >"$part.text"
{ iconv -c -f UTF-8 -t UTF-8 "$part.text" || true; } | tr -d '\000-\010\013-\037\177' | LC_ALL=C awk '
  # An entry starts with its word at the left edge and \its syllables\; its lines are indented or empty. What stands
  # before the first entry is the licence and the history of the file.
  function put() {
    if (entry != "" && started) printf "{\"text\": \"%s\"}\n", entry
    entry = ""
  }
  /^[^ ]/ { put() }
  /^[^ ].*\\.+\\/ { started = 1 }
  {
    gsub(/\\/, "&&")
    gsub(/"/, "\\\\&")
    gsub(/\t/, " ")
  }
  /^ *$/ { blank = blank "\\n"; next }
  { entry = entry (entry == "" ? "" : blank) $0 "\\n"; blank = "" }
  END { put() }
' >"$part"
if [ ! -s "$part" ]; then
  echo "gcide.sh: no entries found in $dictionary." >&2
  exit 1
fi
mv "$part" "$out"
echo "$out: $(wc -l <"$out") entries" >&2
