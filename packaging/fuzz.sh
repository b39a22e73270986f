#!/usr/bin/env bash
# Runs every fuzz target of the tree for the time given, one after the other.
# Minimizing is bounded: by default it eats a short run whole.
set -euo pipefail
time=${1:-10s}
cd "$(dirname "$0")/.."
grep -rlE '^func Fuzz[A-Za-z0-9_]*\(f \*testing\.F\)' --include='*_test.go' . | sort | while read -r file; do
  grep -oE '^func Fuzz[A-Za-z0-9_]*' "$file" | cut -c6- | while read -r target; do
    echo "== $(dirname "$file") $target"
    ${GO:-go} test -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 50x "$(dirname "$file")" </dev/null
  done
done
