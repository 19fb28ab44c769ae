#!/usr/bin/env bash
# Runs shellcheck over every shell script.
set -eu
cd "$(dirname "$0")/../.."
git ls-files '*.sh' .ci/run | xargs shellcheck -x -S warning
