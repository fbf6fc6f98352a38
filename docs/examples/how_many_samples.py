"""
How many samples
================

``predict`` averages over networks. One alone is worse than the posterior mean, because
its noise is not averaged out; a few are about as good as many. The picture shows it for
the classifier of digits, with five sets of networks.
"""

from importlib.resources import files

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import bnnify

torch.manual_seed(0)
content = torch.load(str(files("bnnify") / "data" / "digits.pt"), weights_only=True)
images, labels = content["images"].float() / 16, content["labels"].long()
x, y, test_x, test_y = images[:200], labels[:200], images[400:], labels[400:]
network = nn.Sequential(
    nn.Flatten(),
    nn.Linear(64, 128),
    nn.ReLU(),
    nn.Linear(128, 128),
    nn.ReLU(),
    nn.Linear(128, 10),
)
optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
for _ in range(200):
    optimizer.zero_grad()
    F.cross_entropy(network(x), y).backward()
    optimizer.step()

noise = bnnify.ResponseStd(
    [(images[200:400], labels[200:400])], likelihood="logits", tuning={"labels": True}
)
bnn = bnnify.convert(network, posterior_std=noise)

# %%
# NLL by the number of networks
# -----------------------------

COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)
found = torch.tensor(
    [
        [
            F.nll_loss(
                bnn.predict(
                    test_x, num_samples=count, likelihood="logits", seed=seed
                ).mean.log(),
                test_y,
            ).item()
            for count in COUNTS
        ]
        for seed in range(5)
    ]
)
with torch.no_grad():
    single = F.cross_entropy(network(test_x), test_y).item()
for count, nlls in zip(COUNTS, found.T, strict=True):
    span = f"from {nlls.min():.3f} to {nlls.max():.3f}"
    print(f"{count:4} networks: NLL {nlls.mean():.3f}, {span}")
print(f"the network as it was trained: {single:.3f}")

figure, axes = plt.subplots(figsize=(5, 3.75), layout="constrained")
axes.plot(COUNTS, found.T, "o-", color="C0", alpha=0.5, markersize=4)
axes.axhline(single, color="C1", linestyle="--", label="as it was trained")
axes.set(xscale="log", xlabel="networks", ylabel="NLL on 1,397 digits (nats)")
axes.set_xticks(COUNTS, COUNTS)
axes.legend()

plt.show()
