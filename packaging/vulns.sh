#!/usr/bin/env bash
# Looks up known vulnerabilities in what is linked in. Where the database cannot
# be reached the check did not happen, and this says so instead of passing in silence.
set -uo pipefail
out=$("$@" govulncheck ./cmd/meshupd 2>&1)
code=$?
printf '%s\n' "$out"
if grep -qE 'dial tcp|no such host|lookup |Forbidden|i/o timeout|connection refused|HTTP GET' <<<"$out"; then
  echo "vulnerabilities: NOT CHECKED, the database cannot be reached from here"
  exit 0
fi
exit $code
