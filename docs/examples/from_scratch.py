"""
From scratch
============

bnnify also trains a network that has learned nothing yet. Two things matter then. The
prior: one that is centred on the random weights of the start holds the network where it
is. And the pace: σ must not grow faster than the means learn, so ρ gets their learning
rate, and the weight of the KL rises during the first half of the training.
"""

from importlib.resources import files

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import bnnify

content = torch.load(str(files("bnnify") / "data" / "digits.pt"), weights_only=True)
images, labels = content["images"].float() / 16, content["labels"].long()
x, y, test_x, test_y = images[:1000], labels[:1000], images[1000:], labels[1000:]
EPOCHS = 40


def train(**conversion):
    """Train a fresh network by the ELBO; return it and its accuracies."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    bnn = bnnify.convert(network, **conversion)
    optimizer = torch.optim.Adam(bnn.parameter_groups(lr=3e-3, rho_lr=3e-3))
    accuracies = []
    for epoch in range(EPOCHS):
        beta = bnnify.linear_warmup(epoch, warmup_steps=EPOCHS // 2)
        for batch in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            logits, kl = bnn(x[batch])
            nll = F.cross_entropy(logits, y[batch])
            bnnify.elbo(nll, kl, num_data=len(x), beta=beta).backward()
            optimizer.step()
        mean = bnn.predict(test_x, num_samples=10, likelihood="logits").mean
        accuracies.append((mean.argmax(1) == test_y).float().mean().item())
    return bnn, accuracies


# %%
# Three priors
# ------------
# - ``Pretrained()`` is centred on the weights as they are, and as wide as σ. It is
#   right for weights that are trained.
# - ``Gaussian(std=0.3)`` says that weights are about zero and of that size, whatever
#   they happen to be at the start.
# - The default looks at the last layer. Here it finds the weights of an initialisation,
#   and so makes the prior ten times as wide as they are; the report says so.

_, held = train(prior=bnnify.Pretrained())
bnn, free = train(prior=bnnify.Gaussian(std=0.3), posterior_std=0.02)
default, wide = train()
print(default.report)

figure, axes = plt.subplots(figsize=(5, 3.75), layout="constrained")
for name, accuracies in (
    ("Gaussian(std=0.3)", free),
    ("default", wide),
    ("Pretrained()", held),
):
    print(f"{name:18} accuracy {accuracies[-1]:.1%}")
    axes.plot(range(1, EPOCHS + 1), accuracies, label=name)
axes.set(xlabel="epoch", ylabel="accuracy on 797 other digits")
axes.legend()

# %%
# Which width?
# ------------
# Under a prior that is much too narrow no weight can be as large as it needs to be.
# Under one that is much too wide the KL of every weight is large, and with few data the
# network gives up weights that it would need.
#
# What the network does not need it gives back to the prior: such weights have a small
# signal-to-noise ratio ``|μ|/σ``.

ratios = torch.cat([ratio.flatten() for ratio in bnnify.signal_to_noise(bnn).values()])
print(f"weights with |μ| < σ: {(ratios < 1).float().mean():.0%}")

plt.show()
