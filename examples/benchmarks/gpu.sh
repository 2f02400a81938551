#!/bin/sh
# sh examples/benchmarks/gpu.sh [OPTIONS OF gpu.py]   everything that this package does on a GPU, in one table
# Makes an environment in .gpu first. WHEELS=DIR: from the wheels that lie in this folder, without a network.
# What is not among them (onnxruntime-gpu, flash_attn) is left out, and the table says so. PYTHON=python3.12: that one.
set -e
cd "$(dirname "$0")/../.."
VENV=${VENV:-.gpu}
test -x "$VENV/bin/python" || "${PYTHON:-python3}" -m venv "$VENV"
install() {
    if test -n "$WHEELS"; then
        "$VENV/bin/python" -m pip install --quiet --no-index --find-links "$WHEELS" "$@"
    else
        "$VENV/bin/python" -m pip install --quiet "$@"
    fi
}
if ! test -f "$VENV/ready"; then
    install torch hatchling editables
    install --no-build-isolation -e ".[onnx-gpu]" || {
        echo "no onnxruntime-gpu: the steps with ONNX are left out"
        install --no-build-isolation -e .
    }
    touch "$VENV/ready"
fi
exec "$VENV/bin/python" examples/benchmarks/gpu.py "$@"
