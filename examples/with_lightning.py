"""Do wrong labels shape a network? PyTorch Lightning with one callback more.

    python examples/with_lightning.py

Every twentieth of scikit-learn's digits gets a wrong label. The importance that the callback
records says how much of what the network learned they are, by layer and epoch, and finds them.
About 10 s on one core.
"""

import logging
import warnings

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import sampimp

EPOCHS = 12


class Digits(pl.LightningModule):
    """A network of two hidden layers, trained by SGD."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden1, self.hidden2 = nn.Linear(64, 64), nn.Linear(64, 64)
        self.out = nn.Linear(64, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits."""
        return self.out(torch.relu(self.hidden2(torch.relu(self.hidden1(inputs)))))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss."""
        inputs, labels, _ = batch
        return functional.cross_entropy(self(inputs).double(), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main() -> None:
    """Train, and look at who shaped the network."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    pl.seed_everything(0, verbose=False)

    data = sampimp.load_dataset("digits")
    inputs = torch.as_tensor(data.train_inputs).reshape(-1, 64)
    labels = torch.as_tensor(data.train_labels).clone()
    wrong = np.arange(len(labels)) % 20 == 0
    labels[wrong] = (labels[wrong] + torch.randint(1, 10, (int(wrong.sum()),))) % 10

    # The callback asks for the position of each sample in the data set: the third in a batch.
    loader = DataLoader(TensorDataset(inputs, labels, torch.arange(len(labels))), 50, shuffle=True)
    importance = sampimp.LightningImportance(index=2)
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        callbacks=[importance],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Digits(), loader)

    beta = importance.recorder.to_dataset()["importance"]
    beta = beta.assign_coords(wrong=("sample", wrong))
    share = 100 * beta.sel(sample=wrong).sum("sample") / beta.sum("sample")
    print(
        f"{wrong.mean():.0%} of {len(labels)} labels are wrong. Their share of importance, in %:\n"
    )
    print("epoch ", *(f"{name:>8}" for name in share["layer"].values))
    for row in share:
        print(f"{int(row['epoch']):5} ", *(f"{value:8.1f}" for value in row.values))

    tau = beta.sum(["epoch", "layer"])
    first = tau.argsort().values[::-1][: int(wrong.sum())]
    print(
        f"\nOf the {len(first)} samples with the largest overall importance, "
        f"{wrong[first].mean():.0%} have a wrong label."
    )


if __name__ == "__main__":
    main()
