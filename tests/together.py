"""Some ranks of a run as forks of this process: they find one another as torchrun's processes do, and nothing is imported again."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sphere_edit import ranks

PATIENCE = 120  # seconds


def together(size: int, work: Callable[[], Any]) -> list[int]:
    """Let so many ranks do some ``work``; the status that each ended with, in their order: 0, or 2 for an error that is told."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=_rank, args=(rank, size, port, work)) for rank in range(size)]
    for process in started:
        process.start()
    try:
        for process in started:
            process.join(PATIENCE)
            assert process.exitcode is not None, "a rank waits for ever"
    finally:
        for process in started:
            process.kill()
    return [process.exitcode for process in started]


def _rank(rank: int, size: int, port: int, work: Callable[[], Any]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    status = 0
    try:
        with ranks.joined():
            work()
    except BaseException:
        status = 2
        print(f"rank {rank}:", traceback.format_exc(), file=sys.stderr, flush=True)
    os._exit(status)


def contents(run: Path) -> dict[str, Any]:
    """All that a run's folder holds, but for times and what follows from them."""
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if path.name in ("journal.jsonl", "config.json"):
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            found[name] = [_untimed(json.loads(line)) for line in lines]
        elif path.is_file() and path.name != ".lock":
            found[name] = path.read_bytes()
    return found


def _untimed(entry: dict[str, Any]) -> dict[str, Any]:
    changing = ("time", "seconds", "created", "peak_memory", "expected_memory")
    entry = {name: value for name, value in entry.items() if name not in changing}
    inputs = entry.get("inputs")
    return entry | {"inputs": {k: v for k, v in inputs.items() if k != "config.json"}} if inputs else entry
