"""
Influence: which digits helped and which harmed the final network
=================================================================

A small convolutional network learns 1,500 of scikit-learn's handwritten digits, of which 75 have a
wrong label. A reverse pass through its training says what each digit did to the loss on the test
digits at the end, in which epoch and layer. Then the ten most harmful digits are removed, the
network is trained once more, and the change is compared with the predicted one::

    python examples/harmful_digits.py

About 10 s on one core; needs the extras ``study`` and ``report``.
"""

# %%
# Data, and 75 wrong labels. The activations are smooth (GELU): the influence of a sample is a
# derivative, and with ReLUs a removal makes gates flip, which no derivative sees.

from copy import deepcopy

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from torch.nn import functional

import sampimp

EPOCHS, WRONG, REMOVED = 8, 75, 10

data = sampimp.load_dataset("digits")
inputs, test_inputs = (
    torch.as_tensor(array).reshape(-1, 1, 8, 8) for array in (data.train_inputs, data.test_inputs)
)
labels, test_labels = torch.as_tensor(data.train_labels), torch.as_tensor(data.test_labels)
wrong = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:WRONG]
labels[wrong] = (labels[wrong] + 1) % 10


def build_model() -> nn.Module:
    """Return the network, with the same initialisation at every call."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def losses(model: nn.Module, index: np.ndarray) -> torch.Tensor:
    """Return the loss of each training sample of a batch."""
    logits = model(inputs[index]).double()
    return functional.cross_entropy(logits, labels[index], reduction="none")


def test_loss(model: nn.Module) -> torch.Tensor:
    """Return the mean loss of the test digits: the target."""
    return functional.cross_entropy(model(test_inputs).double(), test_labels)


# %%
# Training is recorded with ``keep_steps=True``, and keeps a copy of the states between the epochs.
# Without the digits in ``removed`` it trains the same batches in the same order; the mean of a
# batch is still over its size with them.

model = build_model()
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
recorder = sampimp.ImportanceRecorder(model, optimizer, keep_steps=True)


def copy_state() -> dict:
    """Return copies of the state dicts of model and optimizer."""
    return deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})


starts = {}
for epoch in range(1, EPOCHS + 1):
    starts[epoch] = copy_state()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))
    for index in order.split(50):
        with recorder.step(index, epoch=epoch):
            optimizer.zero_grad()
            losses(model, index).mean().backward()
            optimizer.step()
starts[EPOCHS + 1] = copy_state()
loss_before = test_loss(model).item()

# %%
# The reverse pass: it replays the epochs, last first, and checks each against the stored state.

run = sampimp.RecordedLoop(model, optimizer, recorder.steps, losses, starts)
result = sampimp.ReversePass(run, {"test loss": test_loss}).to_dataset()
influence = result["influence"].sel(target="test loss")

print(f"{len(labels)} digits, {WRONG} of them with a wrong label; influence on the test loss\n")
print("epoch ", *(f"{name:>9}" for name in influence["layer"].values), " (mean size, nat / 1e6)")
for number in influence["epoch"].values:
    by_layer = 1e6 * abs(influence.sel(epoch=number)).mean("sample")
    print(f"{number:5} ", *(f"{value:9.2f}" for value in by_layer.values))

# %%
# A digit whose influence is positive made the loss larger: it harmed. Its removal changes the loss
# by minus its influence, to first order.

total = influence.sum(["epoch", "layer"]).values
harmful = total.argsort()[::-1][:REMOVED]
found = np.isin(harmful, wrong.numpy()).mean()
print(f"\nOf the {REMOVED} most harmful digits, {found:.0%} have a wrong label.")

retrained = build_model()
second = torch.optim.SGD(retrained.parameters(), lr=0.02, momentum=0.9)
for epoch in range(1, EPOCHS + 1):
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))
    for index in order.split(50):
        kept = index[~np.isin(index, harmful)]
        second.zero_grad()
        (losses(retrained, kept).sum() / len(index)).backward()
        second.step()
change = test_loss(retrained).item() - loss_before
print(
    f"Test loss {loss_before:.4f} nats; without them predicted {-total[harmful].sum():+.4f}, "
    f"actual {change:+.4f}."
)

# %%
# The most harmful digits (with their label) and the most helpful ones.

figure, axes = plt.subplots(2, 10, figsize=(9, 2.8), layout="constrained")
for row, samples, title in zip(
    axes, (harmful, total.argsort()[:10]), ("harmful", "helpful"), strict=True
):
    row[0].set_ylabel(f"most {title}", fontsize=10)
    for panel, sample in zip(row, samples, strict=True):
        panel.imshow(inputs[int(sample), 0], cmap="gray_r")
        panel.set_title(f"label {int(labels[sample])}", fontsize=9)
        panel.set_xticks([])
        panel.set_yticks([])
plt.show()
