"""How many facts of a finished run some GGUF files answer in llama.cpp itself: greedy, from the prompt as it was given.

npm install node-llama-cpp@3.21.1          # in a folder of its own, NODE; it brings a built llama.cpp
python benchmarks/llama_cpp.py runs/demo NODE base.gguf exported/base-edited.gguf

Only facts that the run itself holds are asked (its last evaluation, strict). An answer counts if it begins with the new one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from sphere_edit.runs.folder import RunFolder

ASK = Path(__file__).parents[1] / "tests" / "ask_llama.mjs"


def main() -> None:
    """Read the command line, ask, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("node", help="a folder in which node-llama-cpp was installed")
    parser.add_argument("files", type=Path, nargs="+")
    args = parser.parse_args()
    metrics = RunFolder.open(args.run).current_metrics()
    if metrics is None:
        sys.exit(f"{args.run} is not finished: edit RUN --resume")
    held = [fact for fact in metrics["per_fact"] if fact["edited"]["rewrite"]["accuracy"] == 1]
    print(f"{len(held)} of {len(metrics['per_fact'])} facts are held by the run\n\n| file | answered |\n|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.json"
        prompts.write_text(json.dumps([fact["prompt"].replace("{}", fact["subject"]) for fact in held]))
        for file in args.files:
            asked = ["node", str(ASK), args.node, str(file.resolve()), str(prompts)]
            done = subprocess.run(asked, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"llama.cpp did not answer from {file}: {done.stderr[-1000:]}")
            answers = json.loads(done.stdout.splitlines()[-1])
            said = sum(a.strip().startswith(f["target_new"].strip()) for a, f in zip(answers, held, strict=True))
            print(f"| {file.name} | {said} of {len(held)} |", flush=True)


if __name__ == "__main__":
    main()
