#!/usr/bin/env bash
# The tables of train_step and predict on a CUDA machine: float32 and bfloat16, each eager and compiled, as JSON.
#
#     pip install -e ".[bench]" && benchmarks/speed/gpu.sh FOLDER
#
# With the folder of a Llama of any size, such as one of 7 billion parameters, in LLAMA, and that of sst2.zip in DATA, it
# makes the tables of Bayesian LoRA on it too, with adapters in all layers. With that of MNIST in DATA it trains the
# networks of Blundell et al. for their 600 epochs.
#
# A table that fails does not stop the others; the exit status is 0 only if none has failed.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1

folder=${1:?usage: benchmarks/speed/gpu.sh FOLDER}
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "benchmarks/speed/gpu.sh needs a GPU that torch can use: torch.cuda.is_available() is False." >&2
    exit 1
fi
mkdir -p "$folder" || exit 1

failed=()
measure() { # measure NAME SCRIPT OPTION...
    local name=$1 script=$2
    shift 2
    python -m "benchmarks.speed.$script" --device cuda --output "$folder/$name.json" "$@" | tee "$folder/$name.txt" ||
        failed+=("$name")
}

for dtype in float32 bfloat16; do
    # One workload to a process: a CUDA graph keeps the memory of the network it was made of.
    for workload in W1 W2 W3 W4; do
        measure "train-$workload-$dtype" train_step --dtype "$dtype" --compile --workloads "$workload"
    done
    measure "train-W5-$dtype" train_step --dtype "$dtype" --compile --workloads W5 --channels-last
    measure "predict-$dtype" predict --dtype "$dtype" --compile
done
measure optimizer train_step --optimizer
measure memory train_step --memory
if [ -n "${DATA:-}" ]; then
    python -m benchmarks.quality.blundell --device cuda --data "$DATA" --epochs 600 --compile \
        --checkpoints "$folder/blundell" --output "$folder/blundell.json" | tee "$folder/blundell.txt" || failed+=(blundell)
fi
if [ -n "${LLAMA:-}" ]; then
    measure language-model language_model --base "$LLAMA"
    python -m benchmarks.quality.lora_sst2 --device cuda --base "$LLAMA" --data "${DATA:?the folder of sst2.zip}" \
        --first-layer 0 --seeds 0 1 2 --samples 20 --output "$folder/lora.json" | tee "$folder/lora.txt" || failed+=(lora)
fi

if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[@]}" >&2
    exit 1
fi
