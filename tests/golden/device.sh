#!/usr/bin/env bash
# The golden models and the quantizer through the code of the cuda backend, its kernels thread by thread on the processor and its
# memory out of the host's reach.
set -eu
cd "$(dirname "$0")/../.."
g=tests/golden
[ -x build/ckaqad_on_cpu ] || { echo "no C++ compiler: the kernels of kernels/cuda were not built for the processor"; exit 77; }
for model in nemotron_h_tiny qwen3_tiny; do
  build/ckaqad_on_cpu $g/check.lua --model=$g/$model --golden=$g/$model.golden.safetensors --kernels=cuda_on_cpu
done
# gradients against differences of the loss, a few tensors (tests/gpu.sh: all)
build/ckaqad_on_cpu tests/recipes/differences.lua --device=cuda --model=$g/nemotron_h_tiny --stride=27
build/ckaqad_on_cpu tests/recipes/differences.lua --device=cuda --model=$g/qwen3_tiny --stride=9
reports=$(mktemp -d /tmp/ckaqad-device-XXXXXX)
trap 'rm -rf "$reports"' EXIT
for model in nemotron_h_tiny qwen3_tiny; do # products in BF16, the teacher's matrices in BF16 alone
  build/ckaqad_on_cpu $g/check.lua --model=$g/$model --golden=$g/$model.golden.safetensors --compute=bf16 --report >"$reports/cpu"
  build/ckaqad_on_cpu $g/check.lua --model=$g/$model --golden=$g/$model.golden.safetensors --compute=bf16 --report --kernels=cuda_on_cpu >"$reports/device"
  awk -f $g/bf16.awk "$reports/cpu" "$reports/device"
done
for model in nemotron_h_tiny qwen3_tiny; do # activations in BF16: what ref makes of the same widened values, rounded at the same places
  check() { build/ckaqad_on_cpu $g/check.lua --model=$g/$model --golden=$g/$model.golden.safetensors --compute=bf16 --activations=bf16 --report --kernels=cuda_on_cpu; }
  CKAQAD_CUDA_PLAIN=1 check >"$reports/plain"
  check >"$reports/device"
  awk -f $g/bf16.awk "$reports/plain" "$reports/device"
  awk -f $g/bf16.awk "$reports/plain" $g/$model.bf16.txt
  check >"$reports/again"
  cmp "$reports/device" "$reports/again"
done
for model in nemotron_h_gsm8k qwen3_gsm8k; do # generation: the first tokens
  build/ckaqad_on_cpu $g/check.lua --model=$g/$model --generate=$g/$model.generate.json --most=2 --kernels=cuda_on_cpu
  build/ckaqad_on_cpu $g/check.lua --model=$g/$model --generate=$g/$model.generate.json --most=2 --kernels=cuda_on_cpu --compute=bf16 --activations=bf16 \
    --report >"$reports/tokens"
  grep -q "greedy tokens that differ .* worst 0 " "$reports/tokens"
done
build/ckaqad_on_cpu $g/check.lua --golden=$g/nvfp4_static.golden.safetensors --kernels=cuda_on_cpu
