"""
Plain PyTorch loop: which digits shape a CNN
============================================

A small convolutional network learns 1,500 of scikit-learn's handwritten digits with AdamW. Three
added lines record which digits shape it, in which layer, and in which epoch::

    python examples/plain_loop.py [OUT.zarr]

About 5 s on one core; needs the extras ``study`` and ``report``.
"""

# %%
# Data, network and optimizer are those of any training script.

import sys

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional

import sampimp

out = sys.argv[1] if len(sys.argv) > 1 else "results/importance.zarr"

torch.manual_seed(0)
data = sampimp.load_dataset("digits")
inputs = torch.as_tensor(data.train_inputs).reshape(-1, 1, 8, 8)
labels = torch.as_tensor(data.train_labels)

model = nn.Sequential()
model.add_module("conv1", nn.Conv2d(1, 8, 3, padding=1))
model.add_module("relu1", nn.ReLU())
model.add_module("conv2", nn.Conv2d(8, 16, 3, stride=2, padding=1))
model.add_module("relu2", nn.ReLU())
model.add_module("flatten", nn.Flatten())
model.add_module("out", nn.Linear(256, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

# %%
# The recorder needs the model and its optimizer (1). Each training step runs inside a block that is
# told which samples the batch contains (2); the result is an `xarray.Dataset` (3).
#
# The loss is computed in float64: in float32, the gradient of a sample that the network classifies
# with certainty is mostly rounding error.

recorder = sampimp.ImportanceRecorder(model, optimizer)  # 1

for epoch in range(1, 11):
    for index in torch.randperm(len(labels)).split(50):
        with recorder.step(index, epoch=epoch):  # 2
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(inputs[index]).double(), labels[index])
            loss.backward()
            optimizer.step()

dataset = recorder.to_dataset()  # 3
dataset = dataset.assign_coords(label=("sample", data.train_labels))
dataset.to_zarr(out, mode="w", consolidated=False)
print(f"Written to {out}; xarray.open_zarr(..., consolidated=False) reads it.")

# %%
# Where the importance lies, by epoch and layer. Epoch 1 is left out: Adam's first update is nearly
# a sign, so its importance is not comparable with that of later steps.

importance = dataset["importance"].sel(epoch=slice(2, None))
total = float(importance.sum())

print(f"{len(labels)} digits, 10 epochs of AdamW; importance of epochs 2 to 10, in percent\n")
print("epoch ", *(f"{name:>7}" for name in importance["layer"].values))
for epoch in importance["epoch"].values:
    by_layer = 100 * importance.sel(epoch=epoch).sum("sample") / total
    print(f"{epoch:5} ", *(f"{value:7.1f}" for value in by_layer.values))

# %%
# A tenth of the digits has most of the importance. Several of the first ten are not learned at the
# end: their NLL (negative log-likelihood) is above 1 nat.

tau = importance.sum(["epoch", "layer"])
order = tau.argsort().values[::-1]
share = float(tau[order[: len(tau) // 10]].sum()) / total
print(f"The most important tenth of the digits has {share:.0%} of the importance. The first ten:")
with torch.no_grad():
    nll = functional.cross_entropy(model(inputs).double(), labels, reduction="none")
for sample in order[:10]:
    print(
        f"  digit {sample:4}, a {int(labels[sample])}: {100 * float(tau[sample]) / total:4.1f} %, "
        f"NLL at the end {float(nll[sample]):.4f} nats"
    )

# %%
# The ten digits with the largest overall importance, and the ten with the smallest.

figure, axes = plt.subplots(2, 10, figsize=(9, 2.4), layout="constrained")
for row, samples, title in zip(axes, (order[:10], order[-10:]), ("most", "least"), strict=True):
    row[0].set_title(f"{title} important", loc="left", fontsize=10)
    for panel, sample in zip(row, samples, strict=True):
        panel.imshow(inputs[int(sample), 0], cmap="gray_r")
        panel.set_axis_off()
plt.show()
