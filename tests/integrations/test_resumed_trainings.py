"""Trainings resumed from checkpoints of Lightning and Hugging Face: one recording, same bits."""

import logging
import shutil
import warnings

import oracles
import pytest
import torch
import torch.utils.data
import xarray as xr
from torch import nn
from torch.nn import functional

from sampimp import HuggingFaceImportance, LightningImportance
from sampimp.errors import ConfigError

SAMPLES, EPOCHS = 9, 4

pytestmark = [
    # These warnings are about code of the libraries themselves.
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check_resumed(resumed, whole, epoch):
    """Compare a resumed recording with that of a whole training, bit for bit."""
    resumed, whole = resumed.to_dataset(SAMPLES), whole.to_dataset(SAMPLES)
    xr.testing.assert_identical(resumed.drop_attrs(), whole.drop_attrs())
    assert whole["epoch"].values.tolist() == [1, 2, 3, 4]
    assert float(whole["importance"].min()) > 0
    attrs = resumed["importance"].attrs
    assert attrs == {**whole["importance"].attrs, "resumed_at_epoch": [epoch]}


# PyTorch Lightning.


@pytest.fixture(scope="module")
def pl():
    import lightning.pytorch as pl

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return pl


class Order(torch.utils.data.Sampler):
    """Another order of the samples in each epoch, which Lightning sets."""

    def __init__(self, size):
        self.size, self.epoch = size, 0

    def __len__(self):
        return self.size

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.epoch)
        return iter(torch.randperm(self.size, generator=generator).tolist())

    def set_epoch(self, epoch):
        self.epoch = epoch


class Loader(torch.utils.data.DataLoader):
    """Batches of two; Lightning saves and loads the position inside an epoch."""

    def __init__(self, size=SAMPLES):
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(size, 4, generator=generator)
        labels = torch.randint(0, 3, (size,), generator=generator)
        data = torch.utils.data.TensorDataset(inputs, labels, torch.arange(size))
        super().__init__(data, batch_size=2, sampler=Order(size))
        self.first = self.done = 0  # batches of the epoch, before the iterator's and so far

    def __iter__(self):
        first, self.first = self.first, 0
        for number, batch in enumerate(super().__iter__()):
            if number >= first:
                self.done = number + 1
                yield batch

    def state_dict(self):
        return {"done": self.done % len(self)}

    def load_state_dict(self, state):
        self.first = state["done"]


@pytest.fixture(scope="module")
def fit(pl):
    """Return a function that trains a new network with a new callback."""

    class Small(pl.LightningModule):
        def __init__(self, hidden):
            super().__init__()
            self.net = oracles.tiny_mlp((4, hidden, 3), nn.Tanh).float()

        def training_step(self, batch, batch_idx):
            return functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.training_step(batch, batch_idx)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.05, eps=0.01)

    def run(
        *, epochs=EPOCHS, resume=None, callbacks=(), record=True, hidden=5, size=SAMPLES, **options
    ):
        importance = LightningImportance(2, on_epoch=options.pop("on_epoch", None))
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
            callbacks=[*callbacks, *([importance] if record else [])],
            **options,
        )
        trainer.fit(Small(hidden), Loader(size), ckpt_path=resume)
        return trainer, getattr(importance, "recorder", None)

    return run


@pytest.fixture(scope="module")
def lightning_checkpoints(pl, fit, tmp_path_factory):
    """Return the folder of checkpoints after each step, and the recorder of the whole training."""
    folder = tmp_path_factory.mktemp("checkpoints")
    each = pl.callbacks.ModelCheckpoint(
        folder, "{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False
    )
    last = pl.callbacks.ModelCheckpoint(folder, "epoch-{epoch}", every_n_epochs=1, save_top_k=-1)
    _, recorder = fit(callbacks=[each, last])
    return folder, recorder


@pytest.mark.parametrize(("name", "epoch"), [("epoch-epoch=1", 3), ("10", 3), ("7", 2), ("3", 1)])
def test_lightning_goes_on_with_the_recording(fit, lightning_checkpoints, name, epoch):
    folder, whole = lightning_checkpoints
    reported = []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*contains no recording")
        _, recorder = fit(
            resume=folder / f"{name}.ckpt", on_epoch=lambda epoch, _: reported.append(epoch)
        )
    check_resumed(recorder, whole, epoch)
    # The checkpoint after an epoch's last step is from before the end of this epoch.
    assert reported == list(range(2 if name == "10" else epoch, EPOCHS + 1))


def test_lightning_reads_checkpoints_of_accumulated_batches(pl, fit, tmp_path):
    """Save after each batch, before the recorder's hook and between two accumulated ones."""

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}-{batch_idx}.ckpt")

    _, whole = fit(callbacks=[Save()], accumulate_grad_batches=2)
    for name, steps, samples in (("1-0", 3, 0), ("1-1", 4, 4), ("1-2", 4, 4), ("1-4", 6, 9)):
        checkpoint = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        saved = checkpoint["callbacks"]["LightningImportance"]
        assert saved["global_step"] == saved["recorder"]["step_count"] == steps
        held = saved["recorder"]["epochs"]
        assert len(held[2]["index"] if 2 in held else []) == samples
        assert not any(vars(value) for value in checkpoint["state_dict"].values())
    for name, epoch in (("1-1", 2), ("1-4", 3)):
        _, recorder = fit(resume=tmp_path / f"{name}.ckpt", accumulate_grad_batches=2)
        check_resumed(recorder, whole, epoch)


def test_lightning_without_a_recording_in_the_checkpoint_says_what_is_missing(fit, tmp_path):
    for epochs, words in (
        (2, "after step 10, in epoch 3; epochs 1 to 2"),
        (1, "in epoch 2; epoch 1"),
    ):
        trainer, _ = fit(epochs=epochs, record=False)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        with pytest.warns(UserWarning, match=rf"last.ckpt contains no recording .*{words} will be"):
            _, recorder = fit(resume=tmp_path / "last.ckpt", epochs=3)
        assert recorder.to_dataset()["epoch"].values.tolist() == list(range(epochs + 1, 4))


def test_lightning_refuses_the_recording_of_another_training(fit, lightning_checkpoints, tmp_path):
    folder, _ = lightning_checkpoints
    with pytest.raises(ConfigError, match=r"a training set of 10 samples(.|\n)*Got one of 9"):
        fit(resume=folder / "10.ckpt", size=10)
    checkpoints = [torch.load(folder / f"{name}.ckpt") for name in (5, 10)]
    trainers = [
        (
            "callbacks",
            r"up to step 5, where(.|\n)*up to step 10: 10 steps, epochs 1 to 2(.|\n)*mixed",
        ),
        ("state_dict", "other values: 10 steps, epochs 1 to 2"),
    ]
    for (part, words), (one, other) in zip(trainers, [(0, 1), (1, 0)], strict=True):
        torch.save({**checkpoints[one], part: checkpoints[other][part]}, tmp_path / "mixed.ckpt")
        with pytest.raises(ConfigError, match=words):
            fit(resume=tmp_path / "mixed.ckpt")


def test_lightning_does_not_go_on_with_the_checkpoint_of_a_test(pl, fit, lightning_checkpoints):
    folder, _ = lightning_checkpoints
    trainer, _ = fit(epochs=1)
    (importance,) = (c for c in trainer.callbacks if isinstance(c, LightningImportance))
    trainer.validate(
        trainer.lightning_module, Loader(), ckpt_path=folder / "10.ckpt", verbose=False
    )
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trainer.lightning_module, Loader())
    assert importance.recorder.to_dataset()["epoch"].values.tolist() == [2]


# Hugging Face.


class Net(nn.Module):
    """A network in the interface of transformers, with dropout."""

    def __init__(self, hidden):
        super().__init__()
        self.first, self.drop, self.last = (
            nn.Linear(4, hidden),
            nn.Dropout(0.2),
            nn.Linear(hidden, 3),
        )

    def forward(self, x, labels):
        logits = self.last(self.drop(torch.tanh(self.first(x))))
        return {"loss": functional.cross_entropy(logits, labels)}


@pytest.fixture(scope="module")
def train():
    """Return a function that trains a new network with a new trainer, in random order."""
    import transformers

    transformers.logging.set_verbosity_error()

    def run(folder, *, resume=None, hidden=5, size=SAMPLES, record=True, on_epoch=None, **options):
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(size, 4, generator=generator).tolist()
        rows = [{"x": x, "labels": i % 3, "index": i} for i, x in enumerate(inputs)]
        transformers.set_seed(0)
        defaults = {"num_train_epochs": EPOCHS, "save_strategy": "steps", "save_steps": 1}
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=2,
            learning_rate=0.05,
            adam_epsilon=0.01,
            lr_scheduler_type="constant",
            remove_unused_columns=False,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            logging_strategy="no",
            **defaults | options,
        )
        trainer = transformers.Trainer(Net(hidden), arguments, train_dataset=rows)
        if not record:
            trainer.data_collator = lambda rows: transformers.default_data_collator(
                [{key: row[key] for key in ("x", "labels")} for row in rows]
            )
            trainer.train(resume_from_checkpoint=resume)
            return None
        before = trainer.train
        with HuggingFaceImportance(trainer, on_epoch=on_epoch) as importance:
            trainer.train(resume_from_checkpoint=resume)
        assert trainer.train == before
        return importance.recorder

    return run


@pytest.fixture(scope="module")
def hugging_face_checkpoints(train, tmp_path_factory):
    """Return the folder of checkpoints after each step, and the recorder of the whole training."""
    folder = tmp_path_factory.mktemp("checkpoints")
    recorder = train(folder)
    return folder, recorder


@pytest.mark.parametrize(("step", "epoch"), [(10, 3), (7, 2), (3, 1)])
def test_hugging_face_goes_on_with_the_recording(
    train, hugging_face_checkpoints, tmp_path, step, epoch
):
    folder, whole = hugging_face_checkpoints
    reported = []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*contains no recording")
        recorder = train(
            tmp_path,
            resume=str(folder / f"checkpoint-{step}"),
            on_epoch=lambda epoch, _: reported.append(epoch),
        )
    check_resumed(recorder, whole, epoch)
    # The checkpoint after an epoch's last step is from before the end of this epoch.
    assert reported == list(range(2 if step == 10 else epoch, EPOCHS + 1))


def test_hugging_face_finds_its_last_checkpoint(train, tmp_path):
    """Two epochs, and two more from the last checkpoint, of those of which one is kept."""
    reported = []
    options = {"save_strategy": "epoch", "save_total_limit": 1}
    train(tmp_path / "parts", num_train_epochs=2, **options)
    recorder = train(
        tmp_path / "parts", resume=True, on_epoch=lambda e, _: reported.append(e), **options
    )
    check_resumed(recorder, train(tmp_path / "whole", **options), 3)
    assert reported == [3, 4]
    (last,) = (tmp_path / "parts").iterdir()
    assert (last / "sampimp_recorder.pt").is_file()
    assert not list(last.glob("*.writing"))


def test_hugging_face_without_a_recording_says_what_is_missing(train, tmp_path):
    train(tmp_path, record=False, num_train_epochs=2)
    words = (
        r"checkpoint-7 contains no recording .*after step 7, in epoch 2; epoch 1 will be missing"
    )
    with pytest.warns(UserWarning, match=words):
        recorder = train(tmp_path, resume=str(tmp_path / "checkpoint-7"), num_train_epochs=3)
    importance = recorder.to_dataset(SAMPLES)["importance"]
    assert importance["epoch"].values.tolist() == [2, 3]
    assert importance.isnull().any("layer").sum("sample").values.tolist() == [4, 0]
    recorder = train(tmp_path, resume=str(tmp_path / "checkpoint-15"))  # holds what was recorded
    assert recorder.to_dataset()["epoch"].values.tolist() == [2, 3, 4]


def test_hugging_face_refuses_the_recording_of_another_training(
    train, hugging_face_checkpoints, tmp_path
):
    folder, _ = hugging_face_checkpoints
    checkpoint = tmp_path / "checkpoint-5"
    shutil.copytree(folder / "checkpoint-5", checkpoint)
    with pytest.raises(ConfigError, match=r"a training set of 10 samples(.|\n)*Got one of 9"):
        train(tmp_path, resume=str(checkpoint), size=10)
    shutil.copy(folder / "checkpoint-10" / "sampimp_recorder.pt", checkpoint)
    words = r"up to step 5, where(.|\n)*up to step 10: 10 steps, epochs 1 to 2(.|\n)*checkpoint-5"
    with pytest.raises(ConfigError, match=words):
        train(tmp_path, resume=str(checkpoint))
    whole = (checkpoint / "sampimp_recorder.pt").read_bytes()
    for content in (whole[:-100], b"nonsense", b""):
        (checkpoint / "sampimp_recorder.pt").write_bytes(content)
        with pytest.raises(ConfigError, match=r"bytes that torch.load cannot(.|\n)*or delete this"):
            train(tmp_path, resume=str(checkpoint))
