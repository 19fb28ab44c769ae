#!/usr/bin/env bash
# Every golden file through the program, with both kernel tables.
set -eu
cd "$(dirname "$0")/../.."
g=tests/golden
for kernels in ref cpu; do
  for model in nemotron_h_tiny qwen3_tiny; do
    build/ckaqad $g/check.lua --model=$g/$model --golden=$g/$model.golden.safetensors --kernels=$kernels
  done
  for file in nvfp4 nvfp4_static losses; do build/ckaqad $g/check.lua --golden=$g/$file.golden.safetensors --kernels=$kernels; done
done
for model in nemotron_h_gsm8k qwen3_gsm8k; do
  build/ckaqad $g/check.lua --model=$g/$model --tokens=$g/$model.tokens.json
  build/ckaqad $g/check.lua --model=$g/$model --chat=$g/$model.chat.json
  build/ckaqad $g/check.lua --model=$g/$model --generate=$g/$model.generate.json
done
