#!/usr/bin/env bash
# The whole path on scikit-learn's digits: pre-train masked, fine-tune, draw and score, and the same
# from scratch in the training time of both stages together; then a page on the three runs.
#
#   launch/demo.sh [OUTPUT_FOLDER]
#
# An interrupted demo resumes where it stopped.
set -euo pipefail

if [[ ${1-} == -h || ${1-} == --help ]]; then
  sed -n '2,/^[^#]/{ s/^# \{0,1\}//p }' "$0"
  exit 0
fi
if [[ $# -gt 1 || ${1-} == -* ]]; then
  echo "error: the arguments are '$*'; expected one folder; type launch/demo.sh FOLDER" >&2
  exit 2
fi
out=${1:-demo_output}
[[ $out == *://* ]] || out=$(realpath -m "$out")
cd "$(dirname "$0")/.."

stage() { printf '\n== %s\n' "$*"; }

# run NAME CONFIG [FLAG...]
run() {
  python main.py --config="configs/$2.py" --workdir="$out/$1" --config.data.dir="$out/data" "${@:3}"
}

stage "1/6 masked pre-training: half of each digit is hidden"
run pretrain pretrain_digits
stage "2/6 fine-tuning on whole digits, from those weights"
run finetune finetune_digits --config.init.path="$out/pretrain"
stage "3/6 drawing and scoring digits of the two stages"
run finetune finetune_digits --config.init.path="$out/pretrain" --mode=evaluate

# A step from scratch takes as long as one of fine-tuning: same network, same images.
steps=$(python - "$out/pretrain" "$out/finetune" <<'EOF'
import sys

from maskdm_jax.report import runs

first, second = runs.read(sys.argv[1:])
step_s = runs.cost(second).seconds / runs.steps(second)
print(round((runs.cost(first).seconds + runs.cost(second).seconds) / step_s))
EOF
)
stage "4/6 the baseline from scratch: $steps steps, as long as both stages together"
run scratch scratch_digits --config.train.num_steps="$steps"
stage "5/6 drawing and scoring its digits"
run scratch scratch_digits --config.train.num_steps="$steps" --mode=evaluate

stage "6/6 a page on the three runs"
python -m maskdm_jax.report "$out/pretrain" "$out/finetune" "$out/scratch" --out="$out/report.html"
