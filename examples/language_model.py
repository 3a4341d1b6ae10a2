"""Which sentences shaped a small GPT-2, and where in it: Hugging Face Trainer and one with block.

    python examples/language_model.py

The text is made here: a small grammar in which a verb agrees with its subject. Most sentences are
plain, some are questions, and a few disagree. About 10 s on one core.
"""

import random
import tempfile
from typing import Any

import transformers
import xarray as xr

import sampimp

NOUNS = {"cat": "cats", "dog": "dogs", "bird": "birds", "child": "children", "king": "kings"}
KINDS = {"plain": 85, "question": 10, "disagrees": 5}  # in percent
VERBS = {"sees": "see", "likes": "like", "follows": "follow", "hears": "hear"}
SENTENCES, EPOCHS, LENGTH = 400, 8, 7


def make_sentence(rng: random.Random) -> tuple[str, str]:
    """Return a sentence and its kind."""
    singular, one = rng.random() < 0.5, rng.choice([*NOUNS])
    subject = one if singular else NOUNS[one]
    thing = rng.choice([*NOUNS, *NOUNS.values()])
    third = rng.choice([*VERBS])
    kind = rng.choices([*KINDS], [*KINDS.values()])[0]
    if kind == "question":
        return f"{'does' if singular else 'do'} the {subject} {VERBS[third]} the {thing}", kind
    verb = third if singular == (kind == "plain") else VERBS[third]
    return f"the {subject} {verb} the {thing} .", kind


def encode(sentences: list[str]) -> list[dict[str, Any]]:
    """Return a row for the data set of each sentence: tokens, labels, and its position."""
    words = [sentence.split() for sentence in sentences]
    ids = {word: number for number, word in enumerate(sorted({w for ws in words for w in ws}), 1)}
    rows = []
    for index, own in enumerate(words):
        tokens = [0, *(ids[word] for word in own)]  # 0 begins a sentence, and fills it up
        padding = LENGTH - len(tokens)
        rows.append(
            {
                "input_ids": tokens + [0] * padding,
                "labels": tokens + [-100] * padding,
                "index": index,
            }
        )
    return rows


def train(rows: list[dict[str, Any]]) -> xr.DataArray:
    """Return importance (epoch, layer, sample)."""
    transformers.logging.set_verbosity_error()
    transformers.set_seed(0)
    config = transformers.GPT2Config(
        vocab_size=1 + max(max(row["input_ids"]) for row in rows),
        n_positions=LENGTH,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=20,
            learning_rate=3e-3,
            remove_unused_columns=False,  # or Trainer would drop "index"
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
        )
        trainer = transformers.Trainer(
            transformers.GPT2LMHeadModel(config), arguments, train_dataset=rows
        )
        trainer.remove_callback(transformers.PrinterCallback)
        with sampimp.HuggingFaceImportance(trainer) as importance:
            trainer.train()
    return importance.recorder.to_dataset()["importance"]


def part_of(layer: str) -> str:
    """Return which part of the network a layer is in."""
    if layer.startswith("transformer.h."):
        _, _, block, kind, *_ = layer.split(".")
        return f"block {int(block) + 1}, " + {"attn": "attention", "mlp": "MLP"}.get(kind, "norms")
    return {"transformer.wte": "words", "transformer.wpe": "positions"}.get(layer, "last norm")


def main() -> None:
    """Train, and say which sentences shaped which part, and when."""
    rng = random.Random(0)
    sentences, kinds = zip(*(make_sentence(rng) for _ in range(SENTENCES)), strict=True)
    beta = train(encode(list(sentences)))
    # Adam's very first steps are signs, almost, and have an importance of another kind.
    beta = beta.sel(epoch=slice(2, None))
    beta = beta.assign_coords(
        kind=("sample", list(kinds)),
        part=("layer", [part_of(name) for name in beta["layer"].values]),
    )
    by_part = beta.sum("epoch").groupby("part").sum()
    by_epoch = beta.sum("layer")

    def print_row(name: str, tau: xr.DataArray) -> None:
        relative = (tau.groupby("kind").mean() / tau.mean()).sel(kind=list(KINDS)).values
        print(f"{name:20}", *(f"{value:10.2f}" for value in relative))

    print("Importance of a sentence, by its kind; 1 is that of the average sentence\n")
    print(f"{'':20}", *(f"{kind:>10}" for kind in KINDS))
    print(f"{'sentences':20}", *(f"{kinds.count(kind):10}" for kind in KINDS))
    for name in dict.fromkeys(beta["part"].values):
        print_row(name, by_part.sel(part=name))
    print()
    for epoch in by_epoch["epoch"].values:
        print_row(f"epoch {epoch}", by_epoch.sel(epoch=epoch))

    print("\nThe sentence that shaped each part most in the last epoch\n")
    last = beta.sel(epoch=EPOCHS).groupby("part").sum()
    for name in dict.fromkeys(beta["part"].values):
        first = int(last.sel(part=name).argmax("sample"))
        print(f"{name:20} {sentences[first]:34} {kinds[first]}")


if __name__ == "__main__":
    main()
