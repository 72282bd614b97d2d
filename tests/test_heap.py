"""Holes in the C library's heap: parts of some work do not pile them up."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sphere_edit import heap

# The heap is laid out as a comb: holes of eight sizes, between every two of which something stays, and no page of them was ever written.
# Each part fills those of one size, and frees them again.
PARTS = """
import sys, torch
from sphere_edit import heap, ranks
from sphere_edit.models.loading import peak_memory

PART = 150 * 2**20
sizes = [(300 + 4 * part) * 1024 for part in range(8)]
torch.empty(2**24, dtype=torch.uint8)  # freed, it tells glibc that what is smaller comes from the heap
pairs = [(torch.empty(size // 4), torch.ones(1024)) for size in sizes for _ in range(PART // size)]
pins = [pin for _, pin in pairs]
del pairs

def work(size):
    return len([torch.ones(size // 4 - 64) for _ in range(PART // size)])

if sys.argv[1] == "kept":
    heap.HOLES.part_done = lambda: False
heap._SECONDS = 0  # the parts take no time to speak of
before = heap.resident()
ranks.dealt(sizes, work)
print((peak_memory(torch.device("cpu")) - before) >> 20)
"""


def peak_of_parts(what: str) -> int:
    """MiB that eight parts of 150 MiB take at most."""
    done = subprocess.run([sys.executable, "-c", PARTS, what], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


@pytest.mark.skipif(heap._trim() is None, reason="its heap is not glibc's")
def test_holes_of_one_part_are_given_back_before_they_are_many():
    assert peak_of_parts("kept") > 1000, "what this test is about does not happen here"
    assert peak_of_parts("given back") < 500


def test_holes_are_given_back_after_growth_and_seldom(monkeypatch):
    """What is held before and after each look, in units of `GROWN`, and the time; a process waits 2 s for each unit it has grown by."""
    unit = heap.GROWN
    looks = [  # held, seconds, held once it was given back
        (5.0, 0.0, 1.0),  # the first look
        (2.0, 9.0, None),  # grown by one unit, not by more
        (2.5, 9.0, 2.0),  # by one and a half
        (1.5, 9.5, None),  # others have freed something, to which growth is compared from here on
        (3.0, 11.0, None),  # too soon
        (3.0, 12.5, 1.5),
    ]
    held = iter([size * unit for first, _, after in looks for size in (first, after) if size is not None])
    times = iter([seconds * unit * heap._SECONDS / 2 for _, seconds, _ in looks])
    monkeypatch.setattr(heap, "resident", lambda: next(held))
    monkeypatch.setattr(heap.time, "process_time", lambda: next(times))
    monkeypatch.setattr(heap, "give_back", lambda: None)
    holes = heap.Holes()
    assert [holes.part_done() for _ in looks] == [after is not None for _, _, after in looks]


def test_where_the_system_does_not_tell_nothing_is_done(monkeypatch):
    monkeypatch.setattr(heap, "resident", lambda: None)
    monkeypatch.setattr(heap, "give_back", lambda: pytest.fail("given back"))
    assert not heap.Holes().part_done()
