"""The defaults on small models of other families, trained here for some minutes on an invented world. Prints a table for each.

python benchmarks/families.py                      # GPT-2, Qwen2, Gemma 2
python benchmarks/families.py --family gpt2 --models runs/families

Forty people, each with a home, a trade, a pet and a colour. Their names are four to six words out of eight, so that a model has to
put a name together where it ends, as real ones do; half of the sentences list all that somebody has right after the name, the
others say one fact in one of three wordings. Edits give fourteen people another answer each: one wording is the prompt, the others
are paraphrases, facts of people left alone are the neighbours, and perplexity is of text about these. ``tune`` sees twelve people more.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from sphere_edit.editing.settings import make_settings
from sphere_edit.editor import Editor
from sphere_edit.evaluation.catalogue import DIVERGENCE, PARTS, PERPLEXITY, STRICT, of_part
from sphere_edit.facts.readers import FactSet, facts_from
from sphere_edit.models.loading import load_model
from sphere_edit.progress import Quiet
from sphere_edit.tuning import tune

SHAPE = {"num_hidden_layers": 8, "hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 8, "n_embd": 128, "n_inner": 512, "n_head": 4, "n_positions": 128},
    "qwen2": {**SHAPE, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "gemma2": {**SHAPE, "num_key_value_heads": 2, "head_dim": 32, "query_pre_attn_scalar": 32},
    "gemma3_text": {**SHAPE, "num_key_value_heads": 2, "head_dim": 32, "query_pre_attn_scalar": 32},
    "olmo2": {**SHAPE, "num_key_value_heads": 2},
}
_EXPERTS = {
    **SHAPE,
    "num_hidden_layers": 6,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
    "tie_word_embeddings": True,
}
MIXTURES: dict[str, dict[str, Any]] = {  # and a dense twin, of as many numbers a token (benchmarks/experts.py)
    "qwen3": {**_EXPERTS, "intermediate_size": 256, "num_key_value_heads": 2, "head_dim": 32},
    "qwen3_moe": {**_EXPERTS, "num_key_value_heads": 2, "head_dim": 32},
    "gpt_oss": {**_EXPERTS, "intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 32, "sliding_window": 64},
    "deepseek_v3": {
        **_EXPERTS, "moe_intermediate_size": 88, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
        "num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32,
    },
}  # fmt: skip
RATE = 3e-3  # of Adam
SPREAD = 0.06  # of the first weights: with 0.02, which suits larger widths, nothing is learnt in minutes
WORDINGS = {
    "home": ("{} lives in {} .", "The home of {} is in {} .", "To visit {} you have to go to {} ."),
    "trade": ("{} works as a {} .", "The trade of {} is that of a {} .", "Every day {} earns money as a {} ."),
    "pet": ("{} keeps a {} .", "The pet of {} is a {} .", "In the garden of {} you will see a {} ."),
    "colour": ("{} likes the colour {} .", "The favourite colour of {} is {} .", "The door of {} was painted in {} ."),
}
PEOPLE, NAMES, ANSWERS = 40, 8, 12
CARDS = 0.5  # share of sentences that list all of somebody's facts


def invented(count: int, generator: random.Random) -> list[str]:
    """So many different words."""
    syllables = [first + vowel for first in "bdfgklmnprstvz" for vowel in "aeiou"]
    words: set[str] = set()
    while len(words) < count:
        words.add("".join(generator.choices(syllables, k=3)).capitalize())
    return sorted(words)


class World:
    """Who lives where, does what, keeps what and likes which colour."""

    def __init__(self, seed: int):
        self.generator = random.Random(seed)
        words = invented(NAMES + ANSWERS * len(WORDINGS), self.generator)
        self.generator.shuffle(words)
        names, rest = words[:NAMES], words[NAMES:]
        people: set[str] = set()
        while len(people) < PEOPLE:
            people.add(" ".join(self.generator.choices(names, k=self.generator.choice((4, 5, 6)))))
        self.people = sorted(people)
        self.answers = {name: rest[n * ANSWERS : (n + 1) * ANSWERS] for n, name in enumerate(WORDINGS)}
        self.truth = {
            (person, name): self.generator.choice(self.answers[name]) for person in self.people for name in WORDINGS
        }

    def passage(self, people: Sequence[str]) -> str:
        """A few sentences about some people."""
        return " ".join(self._sentence(self.generator.choice(people)) for _ in range(4))

    def _sentence(self, person: str) -> str:
        """A fact in one of its wordings, or all of somebody's in any order, right after the name."""
        names = self.generator.sample(sorted(WORDINGS), len(WORDINGS))
        if self.generator.random() < CARDS:
            return f"{person} " + " ".join(self.truth[person, name] for name in names) + " ."
        return self.generator.choice(WORDINGS[names[0]]).format(person, self.truth[person, names[0]])

    def facts(self, people: Sequence[str], others: Sequence[str]) -> list[dict[str, Any]]:
        """A fact about each of some people with another answer than the truth; facts of ``others`` are its neighbours."""
        found = []
        for person in people:
            name = self.generator.choice(sorted(WORDINGS))
            first, *more = (wording.rsplit(" {}", 1)[0] for wording in WORDINGS[name])
            old = self.truth[person, name]
            beside = [other for other in others if self.truth[other, name] == old][:2]
            found.append(
                {
                    "subject": person,
                    "prompt": first,
                    "target_new": self.generator.choice([word for word in self.answers[name] if word != old]),
                    "target_true": old,
                    "paraphrases": [wording.format(person) for wording in more],
                    "neighbors": [{"prompt": first.format(other), "answer": old} for other in beside],
                }
            )
        return found


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every word of the world is one token."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=["<end>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = sorted({word for text in texts for word in text.split()})
    inner.train_from_iterator(
        [word for word in words for _ in range(2)] + [f" {word}" for word in words for _ in range(2)], trainer
    )
    inner.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 0)]),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<end>", eos_token="<end>", pad_token="<pad>")


def trained(family: str, world: World, tokenizer: PreTrainedTokenizerFast, steps: int, folder: Path) -> float:
    """Train a model, save it, and return its last loss in nats."""
    torch.manual_seed(0)
    size = len(tokenizer) + 16  # some families add special tokens of their own when it is loaded
    config = AutoConfig.for_model(
        family,
        vocab_size=size,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,  # not 0, whose embedding would stay 0 then: in Gemma 2 no gradient is finite at a sentence's start
        initializer_range=SPREAD,
        **{**FAMILIES, **MIXTURES}[family],
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps, pct_start=0.1)
    loss = float("inf")
    for _ in range(steps):
        batch = tokenizer([world.passage(world.people) for _ in range(32)], return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels)
        optimiser.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        loss = float(output.loss.detach())
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return loss


def prepared(family: str, folder: Path, steps: int) -> tuple[Path, Path, FactSet, FactSet]:
    """The folder of a trained model, text about people left alone, and facts to calibrate on and to edit."""
    world = World(0)
    calibrated, edited, others = world.people[:12], world.people[12:26], world.people[26:]
    texts = [wording for wordings in WORDINGS.values() for wording in wordings]
    words = [*" ".join(world.people).split(), *(word for words in world.answers.values() for word in words)]
    model, corpus = folder / family, folder / f"{family}.jsonl"
    if not model.exists():
        began = time.monotonic()
        loss = trained(family, world, tokenizer_of([*texts, " ".join(words)]), steps, model)
        print(f"trained {family} in {time.monotonic() - began:.0f} s, loss {loss:.3f} nats", flush=True)
    world.generator.seed(1)
    corpus.write_text("".join(json.dumps({"text": world.passage(others)}) + "\n" for _ in range(2000)))
    known, facts = (facts_from(world.facts(people, others)) for people in (calibrated, edited))
    return model, corpus, known, facts


def rows_of(family: str, folder: Path, steps: int) -> Iterator[tuple[str, dict[str, Any], float]]:
    """What each method comes to on a family: its name, the scores, and perplexity times the unedited model's."""
    model, corpus, known, facts = prepared(family, folder, steps)
    given = make_settings({"batch_size": 7, "moments": {"corpus": str(corpus)}, "evaluation": {"generation": "off"}})
    defaults = Editor.from_pretrained(
        model, model.parent / "nothing", given, Quiet()
    ).session.layers  # before `tune` is known
    chosen = tune(load_model(str(model)), given, Quiet(), known.facts)[0].settings
    print(f"tune on facts about twelve other people: {chosen}")
    here = {"layers": chosen["layers"]}
    for label, options in (
        ("frugal", {}),
        ("frugal, plain defaults", {"layers": list(defaults)}),
        ("alphaedit", {"method": "alphaedit"}),
        ("alphaedit, the tuned layers", {"method": "alphaedit", **here}),
        ("memit_seq", {"method": "memit_seq"}),
        ("memit_seq, the tuned layers", {"method": "memit_seq", **here}),
    ):  # fmt: skip
        with tempfile.TemporaryDirectory() as run:
            editor = Editor.from_pretrained(
                model, run, make_settings(given.model_dump(exclude_unset=True), options), Quiet()
            )
            metrics = editor.edit(facts)
            editor.close()
        for name in ("unedited", "edited") if label == "frugal" else ("edited",):
            ratio = metrics[name][PERPLEXITY.name] / metrics["unedited"][PERPLEXITY.name]
            yield label if name == "edited" else name, metrics[name], ratio


def main() -> None:
    """One row a family and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, action="append", help="[default: gpt2, qwen2, gemma2]")
    parser.add_argument("--steps", type=int, default=1000, help="training steps of 32 passages")
    parser.add_argument("--models", type=Path, help="keep the trained models there, and take those that are there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = args.models or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        for family in args.family or ("gpt2", "qwen2", "gemma2"):
            shown = [of_part(part, STRICT) for part in PARTS]
            heads = " | ".join([*(metric.words for metric in shown), PERPLEXITY.words, DIVERGENCE.column])
            print(f"\n| family | method | {heads} |\n|---|---|{'---|' * (len(shown) + 2)}")
            for label, scores, ratio in rows_of(family, folder, args.steps):
                cells = " | ".join(f"{scores[metric.name]:.1f}" for metric in shown)
                kl = f"{scores[DIVERGENCE.name]:.3f}" if label != "unedited" else "0"
                print(f"| {family} | {label} | {cells} | × {ratio:.3f} | {kl} |", flush=True)


if __name__ == "__main__":
    main()
