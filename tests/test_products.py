"""Float32 products by the quicker library: as exact as ever, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from threading import Barrier, Thread

import pytest
import torch

from families import tiny
from sphere_edit.models import generation, products
from sphere_edit.models.forward import last_hidden
from sphere_edit.models.generation import generate
from sphere_edit.models.tokens import TokenBatch
from sphere_edit.models.walk import LayerWalk

CPU = torch.device("cpu")


def error(left: torch.Tensor, right: torch.Tensor) -> float:
    expected = left.double() @ right.double()
    return float((left @ right - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", [(1, 64, 32), (16, 576, 1536), (300, 1536, 576), (48, 576, 4096)])
def test_quick_products_are_float32s_against_float64(shape):
    rows, inner, columns = shape
    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    with products.quick_products(CPU, 256):
        assert error(left, right) < 1e-6
    assert error(left.bfloat16().float(), right) < 1e-6 < error(left.bfloat16(), right.bfloat16())  # the measure tells


def test_a_model_says_the_same_with_quick_products_and_without(monkeypatch):
    monkeypatch.setattr(products, "_LEAST_WIDTH", 1)
    loaded = tiny("llama")
    batch = TokenBatch.of([[1, 5, 9, 2], [3, 4]], CPU)
    quick = last_hidden(loaded, batch)
    monkeypatch.setattr(products, "is_quicker", lambda device: False)
    plain = last_hidden(loaded, batch)
    assert float((quick - plain).norm() / plain.norm()) < 1e-5


def test_passes_through_a_model_ask_for_them(monkeypatch):
    monkeypatch.setattr(products, "_LEAST_WIDTH", 1)
    monkeypatch.setattr(products, "is_quicker", lambda device: True)
    loaded, seen = tiny("llama"), []

    def look(*_: object) -> None:
        seen.append(torch.get_float32_matmul_precision())

    for part in (loaded.architecture.decoder_layers(loaded.model)[1], loaded.model.get_output_embeddings()):
        part.register_forward_pre_hook(look)

    def walk() -> None:
        LayerWalk(loaded, [[1, 2, 3]], 0, 2, 64).stand_at(2)

    for run in (
        lambda: last_hidden(loaded, TokenBatch.of([[1, 2]], CPU)),
        lambda: generate(loaded, [[1, 2]], 1),
        walk,
        lambda: loaded.architecture.head(loaded.model, torch.zeros(1, loaded.model.config.hidden_size)),
    ):
        run()
        assert seen, "the hooks were passed"
        assert set(seen) == {"medium"}
        seen.clear()
        assert torch.get_float32_matmul_precision() == "highest"


def test_pytorchs_setting_is_as_it_was_behind_any_number_of_threads(monkeypatch):
    monkeypatch.setattr(products, "is_quicker", lambda device: True)
    before, inside, meeting = torch.get_float32_matmul_precision(), [], Barrier(3)

    def work() -> None:
        with products.quick_products(CPU, 256):
            meeting.wait()
            inside.append(torch.get_float32_matmul_precision())
            meeting.wait()

    threads = [Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside == ["medium"] * 3
    assert torch.get_float32_matmul_precision() == before == "highest"


def test_an_error_inside_leaves_the_setting_as_it_was(monkeypatch):
    monkeypatch.setattr(products, "is_quicker", lambda device: True)
    with pytest.raises(ZeroDivisionError), products.quick_products(CPU, 256):
        _ = 1 / 0
    assert torch.get_float32_matmul_precision() == "highest"


def asked(monkeypatch, amx: bool = False, capability: str = "AVX512", exact: bool = True, chosen: str = "highest"):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(products, "_is_exact", lambda: exact)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: chosen)
    return products.is_quicker(CPU), products.precision(CPU)


def test_they_are_taken_on_a_processor_that_gains_by_them(monkeypatch):
    assert asked(monkeypatch) == (True, "oneDNN")
    assert not products.is_quicker(torch.device("meta"))


@pytest.mark.parametrize(
    "why", [{"amx": True}, {"capability": "AVX2"}, {"exact": False}, {"chosen": "high"}, {"chosen": "medium"}]
)
def test_they_are_left_where_they_would_round_or_somebody_has_chosen(monkeypatch, why):
    assert asked(monkeypatch, **why) == (False, why.get("chosen", "highest"))


def test_narrow_models_keep_theirs(monkeypatch):
    monkeypatch.setattr(products, "is_quicker", lambda device: True)
    with products.quick_products(CPU, 255):
        assert torch.get_float32_matmul_precision() == "highest"


_GROWTH = """
import os, torch
from sphere_edit.models.products import keep_few_kernels
if {few}:
    keep_few_kernels()
weight, rows = torch.randn(1024, 512).bfloat16(), torch.randn(400, 512).bfloat16()
held = lambda: int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
before = held()
for count in range(1, 401):
    torch.nn.functional.linear(rows[:count], weight)
print(held() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="the process's memory is read from /proc")
def test_few_kernels_are_kept():
    """Those of 400 shapes take 0.2 GB where oneDNN does the products, and a third of that in sixty-four."""
    free = {name: value for name, value in os.environ.items() if not name.endswith("_CACHE_CAPACITY")}
    kept, few = (
        int(
            subprocess.run(
                [sys.executable, "-c", _GROWTH.format(few=few)], env=free, capture_output=True, check=True
            ).stdout
        )
        for few in (False, True)
    )
    assert few < max(0.6 * kept, 5e7)


def test_the_head_is_given_rows_that_lie_together(monkeypatch):
    """Else oneDNN would copy the vocabulary once for each row, 7 GB for 64 of SmolLM2's."""
    loaded, together = tiny("llama"), []
    head = loaded.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: together.append(args[0].is_contiguous()))
    said = generate(loaded, [[1, 2, 3], [4, 5]], 2)
    assert together == [True, True]
    monkeypatch.setattr(generation, "_rows_together", lambda head: nullcontext())
    assert generate(loaded, [[1, 2, 3], [4, 5]], 2) == said
    assert not all(together), "transformers gives it the last column of all rows"
