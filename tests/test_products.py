"""Float32 products by the quicker library: as exact as ever, and nothing left behind."""

from __future__ import annotations

from contextlib import nullcontext
from threading import Barrier, Thread
from typing import Any

import pytest
import torch

from families import WIDTH, tiny
from sphere_edit.models import generation, products, shapes
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
    assert asked(monkeypatch) == (True, "oneDNN, few shapes")
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


def test_there_are_few_shapes():
    assert [*map(shapes.rounded, (1, 16, 17, 500, 513, 4096))] == [1, 16, 32, 512, 576, 4096]
    assert len({shapes.rounded(rows) for rows in range(1, 4097)}) == 16 + 31 + 56


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_that_are_added_change_nothing_but_shapes(family, dtype, monkeypatch):
    """Of a layer that is called with 5 rows of 7 tokens: what it says, and the gradient by what it was given."""
    loaded, seen = tiny(family, dtype), []
    layer = loaded.architecture.decoder_layers(loaded.model)[1].mlp
    real = shapes._padded

    def padded(func: Any, place: int, args: Any, kwargs: Any) -> torch.Tensor:
        def counted(*given: Any, **more: Any) -> torch.Tensor:
            seen.append(given[place].shape[:-1].numel())
            return func(*given, **more)

        return real(counted, place, args, kwargs)

    def run(*dtypes: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.randn(5, 7, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        with shapes.FewShapes(*dtypes):
            said = layer(hidden)
        return said, torch.autograd.grad(said.square().sum(), hidden)[0]

    monkeypatch.setattr(shapes, "_padded", padded)
    plain, few = run(), run(dtype)
    assert set(seen) == {48}, "35 rows are 48"
    assert len(seen) >= 2
    for one, other in zip(plain, few, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, atol=1e-5 if dtype is torch.float32 else 2e-2, rtol=2e-2)
    assert float(few[1].norm()) > 0


@pytest.mark.parametrize("quicker", [True, False])
def test_wide_models_have_them_where_onednn_does_their_products(quicker, monkeypatch):
    monkeypatch.setattr(products, "is_quicker", lambda device: quicker)
    seen: list[int] = []
    monkeypatch.setattr(shapes, "_padded", lambda func, place, args, kwargs: seen.append(1) or func(*args, **kwargs))
    for dtype in (torch.float32, torch.bfloat16):
        layer = torch.nn.Linear(4, 4, dtype=dtype)
        with products.quick_products(CPU, 256):
            layer(torch.ones(3, 4, dtype=dtype))
        with products.quick_products(CPU, 255):
            layer(torch.ones(3, 4, dtype=dtype))
        layer(torch.ones(3, 4, dtype=dtype))
    assert len(seen) == 1 + quicker


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
