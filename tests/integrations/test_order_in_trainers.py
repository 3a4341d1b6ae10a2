"""The batches of `StrategyBatchSampler` in real trainers: each epoch's own, after a resume too."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from sampimp import StrategyBatchSampler

SAMPLES = 11

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]


def sampler():
    return StrategyBatchSampler("shuffle", None, 4, sample_count=SAMPLES, seed=5)


def expected(first, last):
    batches = sampler()
    batches.set_epoch(first)
    return [batch for _ in range(first, last) for batch in batches]


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return {"x": torch.full((2,), float(index)), "labels": index % 2, "index": index}


class Net(nn.Module):
    """A network in the interface of transformers that notes which samples it is called with."""

    def __init__(self):
        super().__init__()
        self.linear, self.seen = nn.Linear(2, 2), []

    def forward(self, x, labels, index):
        self.seen.append(index.tolist())
        return {"loss": functional.cross_entropy(self.linear(x), labels)}


@pytest.mark.parametrize("workers", [0, 1])
def test_lightning_visits_the_epochs_batches(tmp_path, workers):
    import lightning.pytorch as pl

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, batch, batch_idx):
            return self.net(**batch)["loss"]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def train_dataloader(self):
            batches = sampler()
            if workers:  # they get the first epoch's batches before Lightning calls set_epoch
                batches.set_epoch(self.current_epoch)
            return DataLoader(Rows(), batch_sampler=batches, num_workers=workers)

    def fit(epochs, checkpoint=None):
        module = Module()
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            default_root_dir=tmp_path,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(module, ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return module.net.seen

    assert fit(2) == expected(0, 2)
    assert fit(4, tmp_path / "last.ckpt") == expected(2, 4)


def test_hugging_face_visits_the_epochs_batches(tmp_path):
    import transformers

    class Ordered(transformers.Trainer):
        def get_train_dataloader(self):
            loader = DataLoader(Rows(), batch_sampler=sampler(), collate_fn=self.data_collator)
            return self.accelerator.prepare(loader)

    def train(epochs, resume):
        arguments = transformers.TrainingArguments(
            output_dir=tmp_path,
            num_train_epochs=epochs,
            remove_unused_columns=False,
            use_cpu=True,
            report_to="none",
            save_strategy="epoch",
            disable_tqdm=True,
        )
        model = Net()
        Ordered(model, arguments, train_dataset=Rows()).train(resume_from_checkpoint=resume)
        return model.seen

    assert train(2, False) == expected(0, 2)
    assert train(4, True) == expected(2, 4)
