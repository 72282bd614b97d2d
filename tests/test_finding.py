"""The layout of models without a row: what is found by running them, on the families that have one and on made-up ones."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from families import FAMILIES, WIDTH, tiny_model, tiny_tokenizer
from sphere_edit import SphereEditError
from sphere_edit.models.architecture import row_of
from sphere_edit.models.finding import found_layout
from sphere_edit.models.loading import prepare
from sphere_edit.models.one_layer import NotFound
from sphere_edit.models.probe import check_head

IDS = list(range(3, 15))
SMALL = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 400,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}


def built(model_type: str, **options: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SMALL, **options}))
    for parameter in model.parameters():  # transformers leaves experts empty
        if parameter.dim() == 3:
            parameter.data = torch.randn(parameter.shape) * 0.2
    return model.float().eval().requires_grad_(False)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_found_is_what_the_familys_row_says(family):
    model, _ = tiny_model(family)
    model.eval().requires_grad_(False)
    row = row_of(family)
    assert row is not None
    known, found = row.architecture(model), found_layout(model, IDS)
    assert replace(found, found="row", parts=()) == replace(known, parts=())
    assert [part.matrices for part in found.parts] == [part.matrices for part in known.parts]


@pytest.mark.parametrize(
    ("model_type", "options", "scale", "matrix"),
    [
        ("granite", {"logits_scaling": 4.0, "residual_multiplier": 0.22}, 0.25, ("mlp.down_proj", False, 0.22)),
        ("cohere", {"logit_scale": 0.0625}, 0.0625, ("mlp.down_proj", False, 1.0)),
        ("olmo2", {}, 1.0, ("mlp.down_proj", True, 1.0)),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": WIDTH, "max_position_embeddings": 64}, 1.0, ("fc2", False, 1.0)),
    ],
)
def test_scales_norms_and_flattened_inputs(model_type, options, scale, matrix):
    model = built(model_type, **options)
    found = found_layout(model, IDS)
    check_head(model, found, IDS, "it")
    assert found.logit_scale == pytest.approx(scale)
    for part in found.parts:
        down = part.matrices["down"]
        assert (down.path, down.inside, pytest.approx(down.factor, rel=1e-3)) == matrix
        assert down.after == ("post_feedforward_layernorm" if model_type == "olmo2" else None)


def test_roles_differ_from_layer_to_layer():
    """DeepSeek's first layer is dense; in the others an expert that all tokens share stands beside the routed ones."""
    small = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    routed = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1}
    groups = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4}
    found = found_layout(built("deepseek_v3", **small, **routed, **groups), IDS)
    assert [part.matrices["down"].path for part in found.parts] == [
        "mlp.down_proj",
        *["mlp.shared_experts.down_proj"] * 2,
    ]
    assert found.having("experts") == [1, 2]
    assert found.module_name(2, "experts") == "model.layers.2.mlp.experts.down_proj"
    assert found.writer == "down"


@pytest.mark.parametrize(("model_type", "transposed"), [("qwen3_moe", False), ("gpt_oss", True)])
def test_experts_alone_in_either_orientation(model_type, transposed):
    routed = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    found = found_layout(built(model_type, **routed, head_dim=8), IDS)
    assert {role for part in found.parts for role in part.matrices} == {"experts"}
    assert all(part.matrices["experts"].transposed is transposed for part in found.parts)
    assert found.writer == "experts"


# --- made-up models -------------------------------------------------------------------------------------------------


class Mixing(nn.Module):
    """Attention's stand-in: the mean of all tokens so far, through two matrices."""

    def __init__(self, width: int):
        super().__init__()
        self.into, self.out_of = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        counts = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)[:, None]
        return self.out_of(self.into(x).cumsum(1) / counts)


class Turned(nn.Module):
    """A linear map stored as [in, out]."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Oddity(nn.Module):
    """A decoder layer with names that mean nothing."""

    def __init__(self, width: int, inner: int, kind: str):
        super().__init__()
        self.kind = kind
        self.alpha, self.beta = nn.RMSNorm(width), nn.RMSNorm(width)
        self.gamma = Mixing(width)
        self.nest = nn.ModuleDict({"p": nn.Linear(width, inner), "q": nn.Linear(width, inner)})
        self.zeta = Turned(inner, width) if kind == "turned" else nn.Linear(inner, width)
        self.omega = nn.RMSNorm(width)

    def mlp(self, x: Tensor) -> Tensor:
        return self.zeta(torch.nn.functional.silu(self.nest["p"](x)) * self.nest["q"](x))

    def forward(self, state: Tensor, **ignored: Any) -> Tensor:
        if self.kind == "parallel":
            seen = self.alpha(state)
            return state + self.gamma(seen) + self.mlp(seen)
        state = state + self.gamma(self.alpha(state))
        change = self.mlp(self.beta(state))
        if self.kind.startswith("after"):
            change = self.omega(change)
        if self.kind == "gated":
            change = change * state.mean(-1, keepdim=True).sigmoid()
        return state + (0.3 * change if self.kind.endswith("scaled") else change)


class Made(nn.Module):
    """A language model that no library knows."""

    def __init__(self, kind: str, depth: int = 3, width: int = 24, inner: int = 40, words: int = 400):
        super().__init__()
        torch.manual_seed(1)
        self.config = SimpleNamespace(model_type="made_up", get_text_config=lambda: SimpleNamespace())
        self.core = nn.Module()
        self.core.words = nn.Embedding(words, width)
        self.core.stack = nn.ModuleDict({"floors": nn.ModuleList(Oddity(width, inner, kind) for _ in range(depth))})
        self.core.end = nn.RMSNorm(width)
        self.say = nn.Linear(width, words, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3)

    def get_input_embeddings(self) -> nn.Module:
        return self.core.words

    def get_output_embeddings(self) -> nn.Module:
        return self.say

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> Any:
        hidden = self.core.words(input_ids)
        for layer in self.core.stack["floors"]:
            hidden = layer(hidden)
        return SimpleNamespace(logits=self.say(self.core.end(hidden)) * 0.5)


@pytest.mark.parametrize(
    ("kind", "inside", "factor", "transposed"),
    [
        ("plain", False, 1.0, False),
        ("turned", False, 1.0, True),
        ("parallel", False, 1.0, False),
        ("scaled", False, 0.3, False),
        ("after", True, 1.0, False),
        ("after, scaled", True, 0.3, False),
        ("gated", True, 1.0, False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_made_up_model(kind, inside, factor, transposed, dtype):
    model = Made(kind).eval().requires_grad_(False).to(dtype)
    found = found_layout(model, IDS)
    check_head(model, found, IDS, kind)
    assert (found.layers, found.final_norm) == ("core.stack.floors", "core.end")
    assert found.logit_scale == pytest.approx(0.5, rel=1e-2)
    for part in found.parts:
        down = part.matrices["down"]
        assert (down.path, down.inside, down.transposed) == ("zeta", inside, transposed)
        assert down.after == ("omega" if kind.startswith("after") else None)
        assert down.factor == pytest.approx(factor, rel=2e-2)


def test_an_encoder_and_a_model_without_layers_are_refused_with_what_is_missing():
    model = Made("plain").eval()
    model.core.stack["floors"] = nn.ModuleList()
    with pytest.raises(NotFound, match="no list of layers was found"):
        found_layout(model, IDS)
    model.say = None
    with pytest.raises(NotFound, match="does not predict tokens"):
        found_layout(model, IDS)


def test_a_model_that_loads_is_told_why_it_cannot_be_edited():
    model = built("opt", ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False, max_position_embeddings=64)
    with pytest.raises(
        SphereEditError, match=r"'small' \(model type 'opt'\) cannot be edited: .*longest list of layers"
    ):
        prepare(model, tiny_tokenizer(), "small")
