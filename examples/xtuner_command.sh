#!/usr/bin/env bash
# GRPO on GSM8K with XTuner's two flags; any setting of groupwise may follow.
#   bash examples/xtuner_command.sh MODEL gsm8k/train.jsonl --output runs/gsm8k
set -euo pipefail
model=$1 data=$2
shift 2
exec groupwise train --model-path "$model" --data-path "$data" "$@"
