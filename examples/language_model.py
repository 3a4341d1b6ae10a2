"""
Hugging Face Trainer: which sentences shape a GPT-2
===================================================

A small grammar makes 400 sentences in which a verb agrees with its subject. Most sentences are
plain, some are questions, and a few break the rule of agreement. One ``with`` block around
``Trainer.train`` records which sentences shape a small GPT-2, and where in it::

    python examples/language_model.py

About 10 s on one core; needs the extras ``study``, ``report`` and ``huggingface``.
"""

# %%
# The sentences are drawn at random; a sample is one sentence.

import random
import tempfile
from typing import Any

import matplotlib.pyplot as plt
import transformers
import xarray as xr

import sampimp

NOUNS = {"cat": "cats", "dog": "dogs", "bird": "birds", "child": "children", "king": "kings"}
KINDS = {"plain": 85, "question": 10, "disagrees": 5}  # in percent
VERBS = {"sees": "see", "likes": "like", "follows": "follow", "hears": "hear"}
SENTENCES, EPOCHS, LENGTH = 400, 8, 7


def make_sentence(rng: random.Random) -> tuple[str, str]:
    """Return a sentence and its kind."""
    is_singular, noun = rng.random() < 0.5, rng.choice([*NOUNS])
    subject = noun if is_singular else NOUNS[noun]
    complement = rng.choice([*NOUNS, *NOUNS.values()])
    verb = rng.choice([*VERBS])  # in the third person singular
    kind = rng.choices([*KINDS], [*KINDS.values()])[0]
    if kind == "question":
        return (
            f"{'does' if is_singular else 'do'} the {subject} {VERBS[verb]} the {complement}",
            kind,
        )
    if is_singular != (kind == "plain"):
        verb = VERBS[verb]
    return f"the {subject} {verb} the {complement} .", kind


rng = random.Random(0)
sentences, kinds = zip(*(make_sentence(rng) for _ in range(SENTENCES)), strict=True)
for kind in KINDS:
    print(f"{kind:10} {sentences[kinds.index(kind)]}")

# %%
# Each row of the data set has a column ``index`` with the position of the sentence. `Trainer`
# removes columns that the model does not use, unless ``remove_unused_columns=False``.


def encode(sentences: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the rows of the data set: tokens, labels, index."""
    words = [sentence.split() for sentence in sentences]
    vocabulary = sorted({word for sentence in words for word in sentence})
    token_of = {word: token for token, word in enumerate(vocabulary, 1)}
    rows = []
    for index, sentence in enumerate(words):
        tokens = [0, *(token_of[word] for word in sentence)]  # 0: start of a sentence, and padding
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
            remove_unused_columns=False,
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


# %%
# Layers are grouped into parts of the network. Epoch 1 is left out: the first update of AdamW,
# which `Trainer` uses, is nearly a sign; its importance is not comparable with that of later steps.


def part_of(layer: str) -> str:
    """Return the part of the network that contains a layer."""
    if layer.startswith("transformer.h."):
        _, _, block, kind, *_ = layer.split(".")
        return f"block {int(block) + 1}, " + {"attn": "attention", "mlp": "MLP"}.get(kind, "norms")
    return {"transformer.wte": "words", "transformer.wpe": "positions"}.get(layer, "last norm")


beta = train(encode(sentences)).sel(epoch=slice(2, None))
beta = beta.assign_coords(
    kind=("sample", list(kinds)),
    part=("layer", [part_of(name) for name in beta["layer"].values]),
)
parts = list(dict.fromkeys(beta["part"].values))
by_part = beta.sum("epoch").groupby("part").sum()
by_epoch = beta.sum("layer")

# %%
# Importance of a sentence by its kind, relative to the average sentence (1). The exceptions to the
# rule of agreement are learned last.


def relative_importance(tau: xr.DataArray) -> list[float]:
    """Return the mean of each kind of sentence, divided by the mean of all sentences."""
    return (tau.groupby("kind").mean() / tau.mean()).sel(kind=list(KINDS)).values.tolist()


def print_row(name: str, values: list[float]) -> None:
    """Print a row of the table."""
    print(f"{name:20}", *(f"{value:10.2f}" for value in values))


print("Importance of a sentence, by its kind; 1 is that of the average sentence\n")
print(f"{'':20}", *(f"{kind:>10}" for kind in KINDS))
print(f"{'sentences':20}", *(f"{kinds.count(kind):10}" for kind in KINDS))
for part in parts:
    print_row(part, relative_importance(by_part.sel(part=part)))
print()
for epoch in by_epoch["epoch"].values:
    print_row(f"epoch {epoch}", relative_importance(by_epoch.sel(epoch=epoch)))

# %%
# The most important sentence of each part in the last epoch.

print("The sentence that shaped each part most in the last epoch\n")
last = beta.sel(epoch=EPOCHS).groupby("part").sum()
for part in parts:
    sample = int(last.sel(part=part).argmax("sample"))
    print(f"{part:20} {sentences[sample]:34} {kinds[sample]}")

figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
curves = [relative_importance(by_epoch.sel(epoch=epoch)) for epoch in by_epoch["epoch"].values]
axes.plot(by_epoch["epoch"], curves, label=list(KINDS))
axes.set(xlabel="epoch", ylabel="importance, times the average", ylim=(0, None))
axes.legend(title="sentence")
plt.show()
