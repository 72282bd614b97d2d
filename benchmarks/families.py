"""The defaults, untouched, on small models of other families, trained here for a minute or two on an invented world. Prints a table.

python benchmarks/families.py                      # GPT-2, Qwen2, Gemma 2
python benchmarks/families.py --family gpt2 --steps 200 --edits 4

Sixty people, each with a home, a trade, a pet and a colour; every fact stands in the training text in two of three wordings, chosen by
chance, so that the third asks for more than parroting. Edits give some of them another answer; the wording left out of the prompt is the
paraphrase, other people's facts are the neighbours, and perplexity is of fresh text about the same world.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from sphere_edit.editor import Editor
from sphere_edit.progress import Quiet

SHAPE = {"num_hidden_layers": 8, "hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 8, "n_embd": 128, "n_inner": 512, "n_head": 4, "n_positions": 128},
    "qwen2": {**SHAPE, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "gemma2": {**SHAPE, "num_key_value_heads": 2, "head_dim": 32, "query_pre_attn_scalar": 32},
}
WORDINGS = {
    "home": ("{} lives in {} .", "The home of {} is in {} .", "To visit {} you have to go to {} ."),
    "trade": ("{} works as a {} .", "The trade of {} is that of a {} .", "Every day {} earns money as a {} ."),
    "pet": ("{} keeps a {} .", "The pet of {} is a {} .", "In the garden of {} you will see a {} ."),
    "colour": ("{} likes the colour {} .", "The favourite colour of {} is {} .", "The door of {} was painted in {} ."),
}
PEOPLE, ANSWERS = 60, 12


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
        words = invented(PEOPLE + ANSWERS * len(WORDINGS), self.generator)
        self.generator.shuffle(words)
        self.people, rest = words[:PEOPLE], words[PEOPLE:]
        self.answers = {name: rest[n * ANSWERS : (n + 1) * ANSWERS] for n, name in enumerate(WORDINGS)}
        self.truth = {
            (person, name): self.generator.choice(self.answers[name]) for person in self.people for name in WORDINGS
        }

    def passage(self) -> str:
        """A few sentences about some people."""
        chosen = self.generator.sample(sorted(self.truth), 4)
        return " ".join(
            self.generator.choice(WORDINGS[name]).format(person, self.truth[person, name]) for person, name in chosen
        )

    def facts(self, count: int) -> list[dict[str, Any]]:
        """Facts with other answers than the truth."""
        found = []
        for person in self.generator.sample(self.people, count):
            name = self.generator.choice(sorted(WORDINGS))
            first, *others = (wording.rsplit(" {}", 1)[0] for wording in WORDINGS[name])
            old = self.truth[person, name]
            neighbours = [other for other in self.people if other != person and self.truth[other, name] == old][:2]
            found.append(
                {
                    "subject": person,
                    "prompt": first,
                    "target_new": self.generator.choice([word for word in self.answers[name] if word != old]),
                    "target_true": old,
                    "paraphrases": [other.format(person) for other in others],
                    "neighbors": [{"prompt": first.format(other), "answer": old} for other in neighbours],
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
        special_tokens=["<end>"],
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
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<end>", eos_token="<end>", pad_token="<end>")


def trained(family: str, world: World, tokenizer: PreTrainedTokenizerFast, steps: int, folder: Path) -> float:
    """Train a model, save it, and return its last loss in nats."""
    torch.manual_seed(0)
    size = len(tokenizer) + 16  # some families add special tokens of their own when it is loaded
    config = AutoConfig.for_model(
        family, vocab_size=size, bos_token_id=0, eos_token_id=0, pad_token_id=0, **FAMILIES[family]
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    loss = float("inf")
    for _ in range(steps):
        batch = tokenizer([world.passage() for _ in range(32)], return_tensors="pt", padding=True)
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


def main() -> None:
    """One row a family and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, action="append")
    parser.add_argument("--steps", type=int, default=1200, help="training steps of 32 passages")
    parser.add_argument("--edits", type=int, default=20)
    parser.add_argument("--method", action="append", help="default: frugal, alphaedit, memit_seq")
    args = parser.parse_args()
    print(
        "| family | method | efficacy | strict | generalization | strict | specificity, strict | perplexity | KL, nats |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for family in args.family or FAMILIES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            world = World(0)
            texts = [wording for wordings in WORDINGS.values() for wording in wordings]
            words = [*world.people, *(word for words in world.answers.values() for word in words)]
            tokenizer = tokenizer_of([*texts, " ".join(words)])
            began = time.monotonic()
            loss = trained(family, world, tokenizer, args.steps, folder / "model")
            print(f"trained {family} in {time.monotonic() - began:.0f} s, loss {loss:.3f} nats")
            corpus = folder / "corpus.jsonl"
            corpus.write_text("".join(json.dumps({"text": world.passage()}) + "\n" for _ in range(2000)))
            facts = world.facts(args.edits)
            for number, method in enumerate(args.method or ("frugal", "alphaedit", "memit_seq")):
                editor = Editor.from_pretrained(
                    folder / "model", folder / str(number), reporter=Quiet(), method=method, batch_size=10,
                    moments={"corpus": str(corpus)}, evaluation={"generation": "off"},
                )  # fmt: skip
                metrics = editor.edit(facts)
                editor.close()
                for when in ("unedited", "edited") if number == 0 else ("edited",):
                    row = metrics[when]
                    names = (
                        "efficacy",
                        "efficacy_strict",
                        "generalization",
                        "generalization_strict",
                        "specificity_strict",
                    )
                    ratio = row["perplexity"] / metrics["unedited"]["perplexity"]
                    kl = f"{row['divergence']:.3f}" if when == "edited" else "0"
                    cells = " | ".join(f"{row[key]:.1f}" for key in names)
                    print(
                        f"| {family} | {method if when == 'edited' else 'unedited'} | {cells} | × {ratio:.3f} | {kl} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
