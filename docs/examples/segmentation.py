"""
Segmentation
============

A small fully convolutional network finds grey discs and bright squares in noisy
pictures. The entropy of each pixel shows where it is unsure: along the edges, and in a
shape that it has never seen.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import bnnify

# %%
# The data
# --------
# Pictures of 32×32 pixels, each with a grey disc (class 1) and a bright square (class
# 2) on the background (class 0).

torch.manual_seed(0)
SIZE = 32
rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")


def pictures(number):
    labels = torch.zeros(number, SIZE, SIZE, dtype=torch.long)
    for label, distance in (
        (1, lambda u, v: (u**2 + v**2).sqrt()),
        (2, lambda u, v: torch.maximum(u.abs(), v.abs())),
    ):
        centre, radius = (
            torch.randint(6, SIZE - 6, (number, 2, 1, 1)),
            torch.randint(4, 7, (number, 1, 1)),
        )
        labels[distance(rows - centre[:, 0], columns - centre[:, 1]) < radius] = label
    return noisy(0.6 * labels), labels


def noisy(brightness):
    return brightness[:, None] + 0.3 * torch.randn(len(brightness), 1, SIZE, SIZE)


images, labels = pictures(256)

# %%
# The network
# -----------
# It gives logits of shape (pictures, classes, 32, 32), so ``CategoricalNLL`` and
# ``predict`` are told where the classes are.

nll = bnnify.CategoricalNLL(class_dim=1)
network = nn.Sequential(
    nn.Conv2d(1, 16, 3, stride=2, padding=1),
    nn.ReLU(),
    nn.Conv2d(16, 32, 3, stride=2, padding=1),
    nn.ReLU(),
    nn.Conv2d(32, 32, 3, padding=1),
    nn.ReLU(),
    nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1),
    nn.ReLU(),
    nn.ConvTranspose2d(16, 3, 4, stride=2, padding=1),
)
optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
for _ in range(30):
    for batch in torch.randperm(len(images)).split(32):
        optimizer.zero_grad()
        nll(network(images[batch]), labels[batch]).backward()
        optimizer.step()

# %%
# Convert and fine-tune
# ---------------------
# The loss is a mean over pixels, so the number of data that divides the KL is the
# number of labelled pixels.

bnn = bnnify.convert(network, posterior_std=bnnify.ResponseStd(images, 0.1))
optimizer = torch.optim.Adam(bnn.parameter_groups(lr=1e-3, rho_lr=1e-2))
for _ in range(10):
    for batch in torch.randperm(len(images)).split(32):
        optimizer.zero_grad()
        logits, kl = bnn(images[batch])
        bnnify.elbo(nll(logits, labels[batch]), kl, num_data=labels.numel()).backward()
        optimizer.step()

test_images, test_labels = pictures(200)
prediction = bnn.predict(test_images, num_samples=20, likelihood="logits", class_dim=1)
right = prediction.mean.argmax(1) == test_labels
sure = prediction.predictive_entropy < prediction.predictive_entropy.quantile(0.9)
print(f"pixels right: {right.float().mean():.1%}")
print(f"of the surer nine tenths: {right[sure].float().mean():.1%}")

# %%
# Where it is unsure
# ------------------
# The last row holds a ring of a brightness between the two, which no training picture
# has.

ring = ((rows - 16) ** 2 + (columns - 16) ** 2).sqrt().sub(8).abs() < 2
shown = torch.cat([test_images[:2], noisy(0.9 * ring[None])])
found = bnn.predict(shown, num_samples=20, likelihood="logits", class_dim=1)
figure, places = plt.subplots(3, 4, figsize=(7, 5.4), layout="constrained")
maps = (
    shown[:, 0],
    found.mean.argmax(1),
    found.predictive_entropy,
    found.mutual_information,
)
for column, (title, kind) in enumerate(
    zip(("picture", "answer", "entropy", "mutual information"), maps, strict=True)
):
    places[0, column].set_title(title)
    for row in range(3):
        places[row, column].imshow(
            kind[row],
            cmap="gray" if column == 0 else "viridis",
            vmin=0 if column else None,
        )
        places[row, column].set_axis_off()

plt.show()
