#!/usr/bin/env bash
# Shell completions and manual page: valid in the shells that are here, and bash completes what it should.
# Usage: completions_test.sh PATH_OF_FATHOM
set -euo pipefail
fathom="$1"
fail() {
  echo "$*"
  exit 1
}

# shellcheck disable=SC1090
source <("$fathom" completions bash)
complete_at() { # complete_at WORDS...: what is offered for the last word
  # shellcheck disable=SC2034  # the completion function reads them
  COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
  _fathom
  echo " ${COMPREPLY[*]} "
}
expect() { # expect WORD WORDS...
  local word="$1" offered
  shift
  offered="$(complete_at "$@")"
  [[ $offered == *" $word "* ]] || fail "'$*' offers '$offered', which lacks '$word'"
}
refuse() {
  local word="$1" offered
  shift
  offered="$(complete_at "$@")"
  [[ $offered != *" $word "* ]] || fail "'$*' offers '$word'"
}
expect plan fathom pl
refuse train fathom pl
expect train fathom ''
expect prepare fathom data ''
refuse train fathom data ''
expect --set fathom train --
refuse --set fathom plan --re
expect --json fathom data prepare --j

# Every command that --help lists is offered.
while read -r command; do expect "$command" fathom ''; done < <(
  "$fathom" --help | awk '/^Subcommands:/ { on = 1; next } on && /^  [a-z]/ { print $1 }'
)
if command -v zsh >/dev/null; then "$fathom" completions zsh | zsh -n || fail "zsh cannot read its completions"; fi
if command -v fish >/dev/null; then "$fathom" completions fish | fish -n || fail "fish cannot read its completions"; fi
page="$("$fathom" completions man)"
[[ $page == .TH\ FATHOM* && $page == *'fathom data prepare'* ]] || fail "the manual page lacks its title or a command"
if command -v groff >/dev/null; then
  warnings="$(groff -man -Tutf8 -ww -z <<<"$page" 2>&1)"
  [[ -z $warnings ]] || fail "groff: $warnings"
fi
status=0
"$fathom" completions tcsh 2>/dev/null || status=$?
[[ $status == 2 ]] || fail "an unknown shell ends with $status, not 2"
"$fathom" --version | grep -qE '^fathom [0-9]+\.[0-9]+\.[0-9]+ \(' || fail "--version: $("$fathom" --version)"
