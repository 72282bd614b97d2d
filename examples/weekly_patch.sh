#!/usr/bin/env bash
# Correct a model week after week: edit this week's facts, hold the model against limits, prove it, ship it; or go back.
#
#   examples/weekly_patch.sh MODEL FACTS RUN OUT [OPTIONS OF sphere-edit edit …]
#
# MODEL  hub id, local folder, .gguf file or smollm2; used the first time alone
# FACTS  this week's facts, as JSONL, JSON or CSV
# RUN    the run folder, which is kept from week to week
# OUT    the folder to export to; it must not exist yet
#
# A run keeps its settings: OPTIONS may be given every week, as long as they say the same.
# STRICT and PERPLEXITY set the limits: per cent of this week's facts, and the multiple of the unedited perplexity.
set -euo pipefail
model=$1 facts=$2 run=$3 out=$4
shift 4

if [ -e "$run/journal.jsonl" ]; then
    before=$(python -c 'import json, sys; print(json.load(open(sys.argv[1] + "/metrics.json"))["after"])' "$run")
    sphere-edit edit "$run" "$facts" --dry-run "$@"
    sphere-edit edit "$run" "$facts" "$@"
else
    before=0
    sphere-edit edit "$model" "$facts" -o "$run" --dry-run "$@"
    sphere-edit edit "$model" "$facts" -o "$run" "$@"
fi

if ! sphere-edit eval "$run" "$facts" --json "$run-scores.json" \
        --fail-under "efficacy_strict=${STRICT:-90}" --fail-over "perplexity_ratio=${PERPLEXITY:-1.2}"; then
    echo "This week's facts are withdrawn: the model goes back to batch $before." >&2
    sphere-edit rollback "$run" --to "$before"
    exit 4
fi

sphere-edit verify "$run"
sphere-edit export "$run" -o "$out"
sphere-edit verify "$out" --against "$run"
echo "Shipped: $out"
