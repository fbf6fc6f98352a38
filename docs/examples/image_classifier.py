"""
Image classifier
================

A classifier of handwritten digits is trained the ordinary way and converted. How sure
it is fits better to how often it is right afterwards, and the digits of which it is
least sure are those that are hard to read.
"""

import tempfile
from importlib.resources import files

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bnnify

# %%
# A trained network
# -----------------
# 1,797 digits of 8×8 pixels come with the package. The network is trained on 200 of
# them, until it makes no mistake there: on others it is then surer than it is right, as
# networks are.

torch.manual_seed(0)
content = torch.load(str(files("bnnify") / "data" / "digits.pt"), weights_only=True)
images, labels = (
    content["images"].view(-1, 1, 8, 8).float() / 16,
    content["labels"].long(),
)
parts = slice(200), slice(200, 400), slice(400, None)
train, held_out, test = (TensorDataset(images[part], labels[part]) for part in parts)
loader = DataLoader(train, batch_size=50, shuffle=True)

network = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1),
    nn.ReLU(),
    nn.Conv2d(16, 24, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Linear(384, 32),
    nn.ReLU(),
    nn.Linear(32, 10),
)
optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
for _ in range(100):
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
network.eval()

# %%
# Convert it, and find how much noise its weights bear
# ----------------------------------------------------
# ``ResponseStd`` gives every layer noise in proportion to its signal, and with
# ``labels`` 200 digits that the network was not trained on say how much. Without labels
# at hand leave ``tuning`` out: then no prediction moves by much.

held_out_loader = DataLoader(held_out, batch_size=100)
noise = bnnify.ResponseStd(
    held_out_loader, likelihood="logits", tuning={"labels": True}
)
bnn = bnnify.convert(network, posterior_std=noise)
print(bnn.report)

# %%
# The report card
# ---------------
# The rest of the digits judge the average of 50 networks, beside the network as it was
# (its weights are the posterior mean) and beside a temperature for each of the two,
# fitted on the same 200 digits. Noise in place of digits is the foreign data.

test_loader = DataLoader(test, batch_size=500)
foreign = torch.rand(500, 1, 8, 8)
report = bnnify.evaluate(
    bnn,
    test_loader,
    likelihood="logits",
    num_samples=50,
    validation=held_out_loader,
    out_of_distribution=foreign,
)
print(report)

# %%
# The average has a better NLL and is better calibrated than the network was. The
# temperature, one number from the same labels, does as much on data like these. And the
# single network tells the noise from digits no worse than the networks together do.
# With other networks it is the other way round: see
# :doc:`which method when </which-method>`.
#
# How sure, and how often right
# -----------------------------
# The reliability diagram sorts digits by the probability of the answer, into groups of
# equal size, and asks how many answers of a group are right. On the diagonal the
# network is right as often as it says.


def reliability(probabilities, groups=8):
    confidence, answers = probabilities.max(1)
    order = confidence.argsort()
    pairs = torch.stack([confidence, (answers == y).float()], 1)[order].chunk(groups)
    return torch.stack([group.mean(0) for group in pairs]).T


x, y = test.tensors
prediction = bnn.predict(x, num_samples=50, likelihood="logits")
with torch.no_grad():
    before = network(x).softmax(1)
after = prediction.mean
figure, axes = plt.subplots(figsize=(5, 3.75), layout="constrained")
axes.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
axes.plot(*reliability(before), "o-", color="C1", label="as it was trained")
axes.plot(*reliability(after), "o-", color="C0", label="converted")
axes.set_title("of 1,397 digits that it has not seen", fontsize="medium")
axes.set(
    xlim=(0.3, 1.02), ylim=(0.3, 1.02), xlabel="how sure", ylabel="how often right"
)
axes.legend(loc="lower right")

# %%
# What it is least sure of
# ------------------------
# Twelve digits with the largest entropy. A red answer is wrong.

entropy = prediction.predictive_entropy
figure, places = plt.subplots(3, 4, figsize=(5, 3.75), layout="constrained")
for axes, index in zip(
    places.flat, entropy.argsort(descending=True).tolist(), strict=False
):
    answer = after[index].argmax().item()
    axes.imshow(x[index, 0], cmap="gray_r")
    axes.set_axis_off()
    color = "black" if answer == y[index] else "C3"
    axes.set_title(f"{answer}? {after[index].max():.0%}", fontsize="small", color=color)

# %%
# Go back, or keep it
# -------------------

with tempfile.TemporaryDirectory() as folder:
    bnnify.save(bnn, f"{folder}/digits.bnn.pt")
    again = bnnify.load(f"{folder}/digits.bnn.pt", network)
plain = bnnify.collapse(bnn)
with torch.no_grad():
    assert torch.equal(plain(x), network(x))  # bit for bit

plt.show()
