#!/usr/bin/env bash
# All checks that need a GPU, in pieces of at most ten minutes each; results as Markdown and JSON.
#
#   benchmarks/gpu/run.sh                            # all pieces, into benchmarks/gpu/results
#   benchmarks/gpu/run.sh FOLDER attention training  # these two, into FOLDER
#   benchmarks/gpu/run.sh --smoke FOLDER             # on a CPU with tiny shapes: that everything runs, no figures
#
# PYTHON is the interpreter; default: .venv/bin/python, else python3. SECONDS_A_PIECE is the time for each, 540. A piece whose packages are
# missing is skipped; one that fails does not stop the others. Ends with a table; exit code 1 if a piece failed.
set -u
cd "$(dirname "$0")/../.." || exit 1

all=(environment attention loss training optimizers checkpoint synthesis evaluation tests)
seconds=${SECONDS_A_PIECE:-540} # it begins nothing new that would end later, and is ended 50 s after that
folder=
pieces=()
options=()
for argument; do
  if [ "$argument" = --smoke ]; then
    options+=(--smoke)
  elif [[ " ${all[*]} " = *" $argument "* ]]; then
    pieces+=("$argument")
  elif [ -z "$folder" ] && [[ "$argument" != -* ]]; then
    folder=$argument
  else
    echo "$argument: neither a piece (${all[*]}) nor the one folder for results nor --smoke" >&2
    exit 2
  fi
done
folder=${folder:-benchmarks/gpu/results}
[ ${#pieces[@]} -gt 0 ] || pieces=("${all[@]}")

python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=true
mkdir -p "$folder"
for piece in "${pieces[@]}"; do
  rm -f "$folder/$piece".{json,md,log}
  timeout --kill-after=10 $((seconds + 50)) \
    "$python" -m "benchmarks.gpu.$piece" --folder "$folder" --seconds "$seconds" "${options[@]}" 2>&1 | tee "$folder/$piece.log"
done
echo
"$python" -m benchmarks.gpu.summary "$folder" "${pieces[@]}"
