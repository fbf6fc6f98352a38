"""
Decide
======

What to do with a prediction: pass on what the network is unsure of, or answer with a
set of classes. Such rules are fitted on data that the network was not trained on, and
saved with the model.
"""

import tempfile
from importlib.resources import files

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import bnnify

# %%
# A network
# ---------
# It learns the digits that come with the package from 200 of them. 800 others are for
# the rules, and the rest is for judging.

torch.manual_seed(0)
content = torch.load(str(files("bnnify") / "data" / "digits.pt"), weights_only=True)
images, labels = content["images"].float() / 16, content["labels"].long()
train, held_out, test = slice(200), slice(200, 1000), slice(1000, None)
network = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
for _ in range(200):
    optimizer.zero_grad()
    F.cross_entropy(network(images[train]), labels[train]).backward()
    optimizer.step()

noise = bnnify.ResponseStd(images[held_out], 0.15)
bnn = bnnify.convert(network, posterior_std=noise)
known = bnn.predict(images[held_out], num_samples=50, likelihood="logits", seed=0)
prediction = bnn.predict(images[test], num_samples=50, likelihood="logits", seed=0)
y = labels[test]
right = prediction.mean.argmax(1) == y
print(f"accuracy {right.float().mean():.1%}")

# %%
# Pass on what is unsure
# ----------------------
# Of the answers that are accepted at most one in fifty may be wrong, with a confidence
# of 95 %.

accept = bnnify.Abstention.fit(known, labels[held_out], risk=0.02)
accepted = accept(prediction)
print(f"accepted: {accepted.float().mean():.1%}")
print(f"wrong among these: {(~right[accepted]).float().mean():.1%}")

# %%
# Answer with a set
# -----------------
# A set that holds the true digit in 99 % of all cases: one digit where it is clear,
# more where it is not. The promise is one on average over such data, and not for each
# digit alone. In red: those that are passed on.

sets = bnnify.ConformalSets.fit(known, labels[held_out], coverage=0.99)
members = sets(prediction)
print(
    f"sets that hold the digit: {members[torch.arange(len(y)), y].float().mean():.1%}"
)
print(f"digits in a set: {members.sum(1).float().mean():.2f}")

order = prediction.predictive_entropy.argsort(descending=True)
figure, places = plt.subplots(2, 5, figsize=(7, 3.4), layout="constrained")
for axes, index in zip(places.flat, order[::25].tolist(), strict=False):
    axes.imshow(images[test][index].view(8, 8), cmap="gray_r")
    axes.set_axis_off()
    digits = members[index].nonzero().flatten().tolist()
    color = "black" if accepted[index] else "C3"
    axes.set_title(f"{{{', '.join(map(str, digits))}}}", fontsize=9, color=color)

# %%
# Save the rules with the model
# -----------------------------

bnn.decisions |= {"abstention": accept, "conformal_sets": sets}
with tempfile.TemporaryDirectory() as folder:
    bnnify.save(bnn, f"{folder}/digits.bnn.pt")
    again = bnnify.load(f"{folder}/digits.bnn.pt", network)
print(list(again.decisions))

plt.show()
