"""The reverse pass through trainings by Lightning and Hugging Face, replayed and differentiated."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from sampimp import (
    HuggingFaceImportance,
    ImportanceRecorder,
    LightningImportance,
    RecordedLoop,
    ReversePass,
)

SAMPLES, EPOCHS, CLIP = 9, 2, 0.05

pytestmark = [
    # These warnings are about code of the libraries themselves.
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def state_of(model, optimizer):
    return deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})


def test_lightning_gives_the_influence_of_a_plain_loop():
    import lightning.pytorch as pl

    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES, 4, generator=generator)
    labels = torch.randint(0, 3, (SAMPLES,), generator=generator)
    starts = {}

    class Small(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

        def training_step(self, batch, batch_idx):
            return functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)

        def on_train_epoch_start(self):
            starts[self.current_epoch + 1] = state_of(self, self.optimizers().optimizer)

        def on_train_end(self):
            starts[EPOCHS + 1] = state_of(self, self.optimizers().optimizer)

    def losses(model, index):
        return functional.cross_entropy(model.net(inputs[index]), labels[index], reduction="none")

    def target(model):
        return functional.cross_entropy(model.net(inputs[:3] + 1), labels[:3])

    model, importance = Small(), LightningImportance(2, keep_steps=True)
    data = torch.utils.data.TensorDataset(inputs, labels, torch.arange(SAMPLES))
    pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[importance],
        max_epochs=EPOCHS,
        gradient_clip_val=CLIP,
        accumulate_grad_batches=2,
    ).fit(model, torch.utils.data.DataLoader(data, batch_size=2))

    def influence(model, optimizer, recorder):
        # Lightning divides by the number of batches to accumulate, also in an epoch's last step,
        # which has one batch here.
        run = RecordedLoop(
            model,
            optimizer,
            recorder.steps,
            lambda model, index: losses(model, index) / (2 * len(index)),
            starts,
            reduction="sum",
            clip_norm=CLIP,
            tolerance=1e-9,
        )
        return ReversePass(run, {"loss": target}).to_dataset()["influence"]

    recorder = importance.recorder
    by_lightning = influence(model, recorder.optimizer, recorder)

    plain = Small()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.3, momentum=0.9)
    recorder = ImportanceRecorder(plain, optimizer, keep_steps=True)
    starts.clear()
    for epoch in range(1, EPOCHS + 1):
        starts[epoch] = state_of(plain, optimizer)
        for passes in ([[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8]]):
            with recorder.step([torch.tensor(rows) for rows in passes], epoch=epoch):
                optimizer.zero_grad()
                for rows in passes:
                    (losses(plain, torch.tensor(rows)).mean() / 2).backward()
                nn.utils.clip_grad_norm_(plain.parameters(), CLIP)
                optimizer.step()
    starts[EPOCHS + 1] = state_of(plain, optimizer)
    by_loop = influence(plain, optimizer, recorder)
    np.testing.assert_allclose(by_lightning, by_loop, rtol=1e-9)
    assert np.abs(by_loop).min() > 0


def test_hugging_face_is_replayed_with_dropout_clipping_and_schedule(tmp_path):
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.set_seed(0)
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=6, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.randint(0, 11, (SAMPLES, 6), generator=torch.Generator().manual_seed(2))
    rows = [{"input_ids": row, "labels": row, "index": i} for i, row in enumerate(ids.tolist())]
    starts = {}

    class KeepStates(transformers.TrainerCallback):
        def on_epoch_begin(self, args, state, control, model, optimizer, **kwargs):
            starts[int(state.epoch) + 1] = state_of(model, optimizer.optimizer)

        def on_train_end(self, args, state, control, model, optimizer, **kwargs):
            starts[EPOCHS + 1] = state_of(model, optimizer.optimizer)

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=3,
        num_train_epochs=EPOCHS,
        learning_rate=0.01,
        adam_epsilon=1e-3,
        max_grad_norm=CLIP,
        lr_scheduler_type="linear",
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[KeepStates()])
    with HuggingFaceImportance(trainer, keep_steps=True) as importance:
        trainer.train()

    def losses(model, index):
        logits = model(input_ids=ids[index]).logits[:, :-1]
        return functional.cross_entropy(
            logits.transpose(1, 2), ids[index][:, 1:], reduction="none"
        ).mean(1)

    def target(model):
        return losses(model, np.arange(3)).mean()

    recorder = importance.recorder
    model.train()
    run = RecordedLoop(
        model, recorder.optimizer, recorder.steps, losses, starts, clip_norm=CLIP, tolerance=1e-6
    )
    influence = ReversePass(run, {"loss": target}).to_dataset()["influence"]
    assert influence["layer"].values.tolist() == list(recorder.layers)
    assert influence.notnull().all()
    total = influence.sum(["epoch", "layer"]).sel(target="loss")
    assert float(total[:3].sum()) < 0  # samples of the target lower its loss
