"""Which handwritten digits shaped a small CNN, in which layer, and when: a plain PyTorch loop.

    python examples/plain_loop.py [OUT.zarr]

The three lines that record are marked; the rest is any training loop. On 1,500 digits of
scikit-learn, about 5 s on one core.
"""

import sys

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
recorder = sampimp.ImportanceRecorder(model, optimizer)  # 1

for epoch in range(1, 11):
    for index in torch.randperm(len(labels)).split(50):
        with recorder.step(index, epoch=epoch):  # 2
            optimizer.zero_grad()
            # In float64, lest the gradient of a sample that the model is sure of be rounding.
            loss = functional.cross_entropy(model(inputs[index]).double(), labels[index])
            loss.backward()
            optimizer.step()

dataset = recorder.to_dataset()  # 3
dataset = dataset.assign_coords(label=("sample", data.train_labels))
dataset.to_zarr(out, mode="w", consolidated=False)

# Adam's very first steps are signs, almost, and have an importance of another kind.
importance = dataset["importance"].sel(epoch=slice(2, None))
total = float(importance.sum())

print(f"{len(labels)} digits, 10 epochs of AdamW; importance of epochs 2 to 10, in percent\n")
print("epoch ", *(f"{name:>7}" for name in importance["layer"].values))
for epoch in importance["epoch"].values:
    by_layer = 100 * importance.sel(epoch=epoch).sum("sample") / total
    print(f"{epoch:5} ", *(f"{value:7.1f}" for value in by_layer.values))

tau = importance.sum(["epoch", "layer"])
order = tau.argsort().values[::-1]
most = float(tau[order[: len(tau) // 10]].sum()) / total
print(f"\nThe most important tenth of the digits has {most:.0%} of the importance. The first ten:")
with torch.no_grad():
    nll = functional.cross_entropy(model(inputs).double(), labels, reduction="none")
for sample in order[:10]:
    print(
        f"  digit {sample:4}, a {int(labels[sample])}: {100 * float(tau[sample]) / total:4.1f} %, "
        f"NLL at the end {float(nll[sample]):.4f} nats"
    )
print(f"\nWritten to {out}; xarray.open_zarr(..., consolidated=False) reads it.")
