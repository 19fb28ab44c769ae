#!/usr/bin/env bash
# Registers, shared memory and spills of every kernel, as ptxas says, and how many of the 64 warps of an SM they leave room for.
# Needs nvcc; prints CSV (kernels/cuda/occupancy.csv is that of sm_90a). Dynamic shared memory is what large launches ask for, attention
# at head_dim 128 (64 where that is in the name); those that ask for under 8 KiB have an empty field, as those that ask for none.
#   bash kernels/cuda/occupancy.sh [90a|100a] >kernels/cuda/occupancy.csv
set -euo pipefail
cd "$(dirname "$0")/../.."
arch=${1:-90a}
export PATH="$PATH:/usr/local/cuda/bin"
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
one() { # FILE
  local name; name=$(basename "$1" .cu)
  nvcc -std=c++17 -O3 -arch="compute_$2" -I. -ptx -o "$3/$name.ptx" "$1"
  ptxas -v --gpu-name "sm_$2" -o /dev/null "$3/$name.ptx" 2>"$3/$name.txt"
  awk -v file="$name.cu" '
    FNR == NR { # PTX: threads of a block
      if (/\.entry /) { match($0, /_Z[A-Za-z0-9_]*/); kernel = substr($0, RSTART, RLENGTH) }
      if (/\.maxntid/) { gsub(/[^0-9, ]/, ""); split($0, n, ","); threads[kernel] = n[1] }
      next
    }
    /Compiling entry function/ { split($0, part, "\047"); kernel = part[2] }
    /spill stores/ { spilled = $5 }
    /Used [0-9]+ registers/ {
      shared = 0
      if (match($0, /[0-9]+ bytes smem/)) shared = substr($0, RSTART, RLENGTH) + 0
      match($0, /Used [0-9]+/); print file "\t" kernel "\t" threads[kernel] "\t" substr($0, RSTART + 5, RLENGTH - 5) "\t" shared "\t" spilled
    }' "$3/$name.ptx" "$3/$name.txt" >"$3/$name.tsv"
}
export -f one
printf '%s\n' kernels/cuda/*.cu | xargs -P "$(nproc)" -I{} bash -c 'one "$@"' one {} "$arch" "$work"
echo "file,kernel,threads,registers,shared,dynamic,spilled,warps"
sort "$work"/*.tsv | c++filt | sed 's/(anonymous namespace):://g; s/__nv_bfloat16/bf16/g; s/void //g; s/([a-z_].*)\t/\t/' | awk -F'\t' '
  function least(a, b) { return a < b ? a : b }
  { dynamic = ""
    if ($1 == "attention.cu" && $2 ~ /^forward/) dynamic = 4 * (128 * 129 + 64 * 33)
    if ($1 == "attention.cu" && $2 ~ /^backward_kv/) dynamic = 4 * (6 * 32 * 129 + 2 * 32 * 33)
    if ($1 == "attention.cu" && $2 ~ /^backward_q/) dynamic = 4 * (5 * 32 * 129 + 2 * 32 * 33)
    if ($1 == "attention_bf16.cu" && $2 ~ /^forward<128/) dynamic = 2 * 4 * 64 * 136
    if ($1 == "attention_bf16.cu" && $2 ~ /^forward<64/) dynamic = 2 * 4 * 64 * 72
    if ($1 == "attention_bf16_backward.cu" && $2 ~ /^backward_(kv|q)<128/) dynamic = 2 * 6 * 64 * 136 + ($2 ~ /_kv/) * 1024
    if ($1 == "attention_bf16_backward.cu" && $2 ~ /^backward_(kv|q)<64/) dynamic = 2 * 6 * 64 * 72 + ($2 ~ /_kv/) * 1024
    if ($1 == "grouped.cu" && $2 ~ /<simt,/) dynamic = 8 * 2 * 16 * 132
    if ($1 == "grouped.cu" && match($2, /(true|false), (true|false)>,/)) { # operands that are copied have four stages, others two
      split(substr($2, RSTART, RLENGTH), copies, /[,>]/)
      dynamic = 2 * ((copies[1] ~ /true/ ? 4 : 2) * 128 + (copies[2] ~ /true/ ? 4 : 2) * 256) * 40
    }
    if ($1 == "losses.cu" && $2 ~ /^kl_top_k/) dynamic = 4 * 16384
    threads = $3 == "" ? 1024 : $3 + 0; warps = threads / 32
    per = int(($4 * 32 + 255) / 256) * 256 * warps # registers come in 256 a warp
    blocks = least(int(65536 / per), int(64 / warps))
    shared = $5 + dynamic
    if (shared > 0) blocks = least(blocks, int(233472 / (shared + 1024)))
    printf "%s,\"%s\",%d,%d,%d,%s,%d,%d\n", $1, $2, threads, $4, $5, dynamic, $6, blocks * warps }'
