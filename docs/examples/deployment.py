"""
Deployment
==========

Networks drawn from the posterior are written as one ONNX file, which onnxruntime runs
without torch and without bnnify. The mean and the mutual information are computed in
the file.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import onnxruntime
import torch
import torch.nn.functional as F
from torch import nn

import bnnify

# %%
# A network
# ---------
# Three clusters of points in the plane.

torch.manual_seed(0)
centres = torch.tensor([[0.0, 2.0], [2.0, -1.0], [-2.0, -1.0]])
labels = torch.arange(300) % 3
points = centres[labels] + 0.7 * torch.randn(300, 2)
network = nn.Sequential(
    nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)
)
optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
for _ in range(200):
    optimizer.zero_grad()
    F.cross_entropy(network(points), labels).backward()
    optimizer.step()
bnn = bnnify.convert(network, posterior_std=bnnify.ResponseStd(points, 0.15))

# %%
# Write it
# --------
# 32 networks in one graph. The file is run on the example, and compared with the
# networks, before it gets its name. The ending decides the format: ``.pt2`` is a
# program for ``torch.export.load``.

folder = tempfile.TemporaryDirectory()
path = Path(folder.name) / "points.onnx"
written = bnnify.export(
    bnn, path, torch.randn(2, 2), num_samples=32, likelihood="logits"
)
print("inputs", written.inputs, "outputs", written.outputs)
print(f"{path.stat().st_size:,} bytes")
print(f"largest difference from torch: {written.max_difference:.1e}")

# %%
# Run it
# ------
# numpy arrays in, numpy arrays out.

session = onnxruntime.InferenceSession(path)
line = torch.linspace(-6, 6, 121)
grid = torch.cartesian_prod(line, line)
mean, information = session.run(["mean", "mutual_information"], {"input": grid.numpy()})
figure, places = plt.subplots(1, 2, figsize=(7, 3.3), layout="constrained")
for axes, title, values in zip(
    places,
    ("probability of the answer", "mutual information (nats)"),
    (mean.max(1), information),
    strict=True,
):
    drawn = axes.pcolormesh(
        line,
        line,
        values.reshape(len(line), len(line)).T,
        cmap="viridis",
        rasterized=True,
    )
    axes.scatter(*points.T, c=labels, cmap="Set1", s=3)
    axes.set_title(title, fontsize="medium")
    figure.colorbar(drawn, ax=axes)

# %%
# In the directions where two clusters are equally far the networks disagree. Elsewhere
# the mutual information falls to zero far away from all points, as the logits of a
# network with rectified linear units grow without bound: it is no measure of distance.

folder.cleanup()
plt.show()
