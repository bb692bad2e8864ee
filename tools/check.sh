#!/usr/bin/env bash
# Every check that trains nothing, with the seconds that each part takes. All of them run, even after one has failed.
#   tools/check.sh [BIN]    BIN: the folder with the environment's commands; .venv/bin
set -uo pipefail
cd "$(dirname "$0")/.." || exit
bin=${1:-.venv/bin}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # this tree, whichever one the environment was installed from
failed=()

part() { # NAME COMMAND [ARGUMENTS]
  local name=$1 began=${EPOCHREALTIME//[.,]/} seconds output
  shift
  if ! output=$("$@" 2>&1); then
    failed+=("$name")
    printf '%s\n' "$output"
  elif [ "$name" = package ]; then
    printf '%s\n' "$output"
  fi
  seconds=$(((${EPOCHREALTIME//[.,]/} - began) / 100000))
  printf 'check: %-12s %4d.%d s\n' "$name" $((seconds / 10)) $((seconds % 10))
}

part lint "$bin/ruff" check .
part format "$bin/ruff" format --check .
part scripts "$bin/shellcheck" .ci/run tools/*.sh launch/*.sh
part types "$bin/mypy"
part imports "$bin/lint-imports"
part reference "$bin/python" tools/reference_files.py . --check
part docs "$bin/python" tools/generated_docs.py docs --check
part package "$bin/python" tools/check_package.py
if [ ${#failed[@]} -gt 0 ]; then
  echo "check: failed: ${failed[*]}" >&2
  exit 1
fi
