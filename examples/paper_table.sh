#!/usr/bin/env bash
# Fill a table of a paper: methods × {plain, SPHERE} × seeds on one data set, all facts asked at the end of the stream.
#
#   examples/paper_table.sh MODEL DATA FACTS OUT [METHOD …]
#
# MODEL  hub id, local folder, .gguf file or smollm2
# DATA   counterfact, zsre, a file or a hub data set
# FACTS  how many of them
# OUT    folder of the bench; run the script again to go on, or in a second terminal to share the work
#
# SETTINGS names a YAML file with settings of every run, SEEDS the seeds ("0 1 2").
set -euo pipefail
model=$1 data=$2 facts=$3 out=$4
shift 4
methods=("${@:-}")
if [ -z "${methods[0]}" ]; then
    methods=(memit alphaedit frugal)
fi

mkdir -p "$out"
python - "$model" "$data" "$facts" "${SEEDS:-0}" "${SETTINGS:-}" "${methods[@]}" > "$out/bench.yaml" <<'PYTHON'
import sys
from pathlib import Path

import yaml

model, data, facts, seeds, settings, *methods = sys.argv[1:]
table = {
    "models": [model],
    "data": {"facts": {"source": data, "limit": int(facts), "skip_bad": True}},
    "methods": {method: {} for method in methods},
    "seeds": [int(seed) for seed in seeds.split()],
    "settings": yaml.safe_load(Path(settings).read_text()) if settings else {"batch_size": 50},
}
print(yaml.safe_dump(table, sort_keys=False, allow_unicode=True))
PYTHON

sphere-edit bench "$out/bench.yaml" -o "$out/runs"
cat "$out/runs/table.md"
echo "LaTeX: $out/runs/table.tex"
