#!/usr/bin/env bash
# The whole path on scikit-learn's digits: pre-train masked, fine-tune, sample, report.
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
cd "$(dirname "$0")/.."
out=${1:-demo_output}

stage() { printf '\n== %s\n' "$*"; }

stage "1/4 masked pre-training: half of each digit is hidden"
python main.py --config=configs/pretrain_digits.py --workdir="$out/pretrain" \
  --config.data.dir="$out/data"
stage "2/4 fine-tuning on whole digits, from those weights"
python main.py --config=configs/finetune_digits.py --workdir="$out/finetune" \
  --config.data.dir="$out/data" --config.init.path="$out/pretrain"
stage "3/4 sampling 64 digits"
python main.py --config=configs/finetune_digits.py --workdir="$out/finetune" \
  --config.data.dir="$out/data" --config.init.path="$out/pretrain" --mode=sample
stage "4/4 report"
python -m maskdm_jax.report --pretrain="$out/pretrain" --finetune="$out/finetune" --out="$out"
printf 'samples: %s\nloss curves: %s\nreport: %s\n' "$out/samples.png" "$out/loss.png" "$out/report.md"
