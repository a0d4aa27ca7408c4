#!/bin/sh
# Runs a command as on a processor with AVX-512, but neither AMX nor half precision: what
# /proc/cpuinfo lists and what oneDNN may use. Needs root, for a /proc/cpuinfo of its own.
# Example: sh benchmark/peers/without_amx.sh sh predict.sh --input CTS --output LABELS
exec unshare --mount sh -c '
    list=$(mktemp) &&
    sed "s/ amx_[a-z0-9]*//g; s/ avx512_[bf]*p*16//g" /proc/cpuinfo > "$list" &&
    mount --bind "$list" /proc/cpuinfo && rm "$list" &&
    exec env ONEDNN_MAX_CPU_ISA=AVX512_CORE "$@"' sh "$@"
