"""
PyTorch Lightning: how wrong labels shape a network
===================================================

Every twentieth of scikit-learn's digits gets a wrong label. One callback records importance, which
shows how much of the training goes into the wrong labels, by layer and epoch, and finds them::

    python examples/with_lightning.py

About 10 s on one core; needs the extras ``study``, ``report`` and ``lightning``.
"""

# %%
# The module is an ordinary `LightningModule` with automatic optimization.

import logging
import warnings

import lightning.pytorch as pl
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import sampimp

EPOCHS = 12
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")


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


# %%
# A batch contains the position of each sample in the data set, here as its third element. The
# callback reads it there.

pl.seed_everything(0, verbose=False)
data = sampimp.load_dataset("digits")
inputs = torch.as_tensor(data.train_inputs).reshape(-1, 64)
labels = torch.as_tensor(data.train_labels).clone()
wrong = np.arange(len(labels)) % 20 == 0
labels[wrong] = (labels[wrong] + torch.randint(1, 10, (int(wrong.sum()),))) % 10

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

# %%
# In epoch 1 a wrong label has no more importance than any other label. At the end, the wrong labels
# are what is left to learn.

beta = importance.recorder.to_dataset()["importance"]
beta = beta.assign_coords(wrong=("sample", wrong))
share = 100 * beta.sel(sample=wrong).sum("sample") / beta.sum("sample")
print(f"{wrong.mean():.0%} of {len(labels)} labels are wrong. Their share of importance, in %:\n")
print("epoch ", *(f"{name:>8}" for name in share["layer"].values))
for row in share:
    print(f"{int(row['epoch']):5} ", *(f"{value:8.1f}" for value in row.values))

# %%
# So the samples with the largest overall importance are mostly those with a wrong label.

tau = beta.sum(["epoch", "layer"])
largest = tau.argsort().values[::-1][: int(wrong.sum())]
print(
    f"Of the {len(largest)} samples with the largest overall importance, "
    f"{wrong[largest].mean():.0%} have a wrong label."
)

figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
for layer in share["layer"].values:
    axes.plot(share["epoch"], share.sel(layer=layer), label=layer)
axes.set(xlabel="epoch", ylabel="importance of wrong labels (%)", ylim=(0, None))
axes.legend(title="layer")
plt.show()
