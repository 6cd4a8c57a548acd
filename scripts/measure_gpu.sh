#!/usr/bin/env bash
# Test and measure this checkout on one GPU, a step at a time. Each step ends within ten minutes, and writes as it goes.
#
#   scripts/measure_gpu.sh STEP [FOLDER]
#
#   tests      the fused kernels against float64, small and on the networks' own sizes
#   measure    the op, models, growing images and profiles: a record, tables and a plot
#   headline   biformer_small beside swin_small and convnext_small in training: eager, from CUDA graphs, and compiled
#   tune       the kernels' tiles beside others, and what the hardware counters say of them (if ncu is there)
#   resume     a killed and resumed run beside an undisturbed one, bit for bit; then what else trains on a GPU
#
# FOLDER (outputs/gpu) takes records and logs. Environment: PYTHON; DEVICE=cpu makes small sizes of everything, which
# shows that the commands run. Nothing is installed, and no network is needed.
set -uo pipefail
cd "$(dirname "$0")/.."
step=${1:?usage: scripts/measure_gpu.sh tests|measure|headline|tune|resume [FOLDER]}
folder=${2:-outputs/gpu}
device=${DEVICE:-cuda}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
mkdir -p "$folder"
export PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/outputs/triton}
failed=0

# run SECONDS NAME COMMAND...: its output to FOLDER/NAME.log too; a command that fails does not keep the next from running.
run() {
    local seconds=$1 name=$2
    shift 2
    echo "== $name: $*"
    timeout "$seconds" "$@" 2>&1 | tee "$folder/$name.log" || { failed=1; echo "== $name failed"; }
}

if [ "$device" = cpu ]; then
    models=(resnet10t --reference resnet10t)
    size=(--input_size 32 --batch_size 2 --rounds 2 --device cpu)
    sections=(--sections layers --budget 5)
    tiles=(--map "14 x 14, top-16" --kernel forward --batch_size 1 --heads 1 --head_dim 16 --rounds 2 --budget 15 --device cpu)
    kernels=(-m "not gpu" -k "empty_batch or inverse_routes")
    gpu=(-m gpu --collect-only)
    workers=1
else
    models=(biformer_small convnext_small --reference swin_small_patch4_window7_224)
    size=(--amp bf16 --channels_last --batch_size 128 --rounds 10 --device cuda)
    sections=(--budget 500)
    tiles=(--budget 200)
    kernels=(-m "not gpu and not compile")
    gpu=(-m "gpu and not compile")
    workers=${GPU_WORKERS:-12}
fi
pytest=("$python" -m pytest -q -p no:cacheprovider -n "$workers")
headline=("$python" scripts/benchmark.py models "${models[@]}" --modes train "${size[@]}")

case $step in
tests)
    run 150 kernels "${pytest[@]}" tests/ops "${kernels[@]}"
    run 400 kernels-on-maps "${pytest[@]}" tests/ops "${gpu[@]}"
    ;;
measure)
    run 580 measure "$python" scripts/benchmark.py all --device "$device" "${sections[@]}" --output "$folder"
    ;;
headline)
    run 90 eager "${headline[@]}" --output "$folder/eager"
    [ "$device" = cpu ] || run 90 graphs "${headline[@]}" --cuda_graph --output "$folder/graphs"
    run 400 compiled "${headline[@]}" --compile --output "$folder/compiled"
    ;;
tune)
    run 260 tune "$python" scripts/tune_kernels.py "${tiles[@]}" --output "$folder/tiles.json"
    if command -v ncu >/dev/null && [ "$device" = cuda ]; then
        run 200 counters ncu --clock-control none --section SpeedOfLight --section Occupancy --section WarpStateStats \
            --kernel-name-base demangled --kernel-name "regex:.*(forward|gradient|gradients)_kernel.*" \
            --filter-mode per-launch-config --launch-skip 1 --launch-count 1 \
            "$python" scripts/benchmark.py op --contenders triton --modes train --amp bf16 --batch_size 128 --rounds 2 \
            --device cuda --output "$folder/counters"
    fi
    ;;
resume)
    run 500 resume "${pytest[@]}" tests/test_cuda.py tests/training/data/test_loader.py "${gpu[@]}"
    ;;
*)
    echo "unknown step $step: tests, measure, headline, tune or resume" >&2
    exit 2
    ;;
esac
exit $failed
