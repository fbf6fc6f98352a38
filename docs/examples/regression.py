"""
Regression with intervals
=========================

A network that fits a curve, where it has data and where it has none. The noise of the
data is learned along with the weights, and a prediction holds both: what the networks
disagree on, and the noise.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import bnnify

# %%
# The data
# --------
# 300 points between -1.5 and 1.5, with noise of standard deviation 0.1.

torch.manual_seed(0)


def curve(x):
    return torch.sin(2 * x) + 0.3 * x


def draw(number):
    x = torch.empty(number, 1).uniform_(-1.5, 1.5)
    return x, curve(x) + 0.1 * torch.randn_like(x)


x, y = draw(300)

# %%
# The network
# -----------
# It starts from random weights, so it needs a prior that leaves it room to learn: here
# the weights are held for N(0, 1) before the data are seen. σ starts small, and the KL
# is faded in, so that the network finds the curve before the prior takes away what it
# does not need.
#
# ``GaussianNLL(learned=True)`` has one parameter, the standard deviation of the noise,
# which goes to the optimizer too.

STEPS = 1500
network = nn.Sequential(
    nn.Linear(1, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 1)
)
bnn = bnnify.convert(
    network, prior=bnnify.Gaussian(std=1.0), posterior_std=0.02, estimator="local"
)
nll = bnnify.GaussianNLL(std=0.3, learned=True)
groups = bnn.parameter_groups(lr=1e-2, rho_lr=1e-2)
optimizer = torch.optim.Adam([*groups, {"params": nll.parameters(), "lr": 1e-2}])
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
for step in range(STEPS):
    optimizer.zero_grad()
    output, kl = bnn(x)
    beta = bnnify.linear_warmup(step, STEPS // 2)
    bnnify.elbo(nll(output, y), kl, num_data=len(x), beta=beta).backward()
    optimizer.step()
    schedule.step()
print(f"the noise that was learned: {nll.std.item():.3f}")

# %%
# The prediction
# --------------
# ``predict`` takes the NLL of the training, and so knows the noise. The dark band is
# what the networks disagree on, which more data would take away; the light one,
# ``interval``, has the noise too.

grid = torch.linspace(-3, 3, 300)[:, None]
prediction = bnn.predict(grid, num_samples=200, likelihood=nll)
figure, axes = plt.subplots(figsize=(5, 3.75), layout="constrained")
places, mean = grid[:, 0], prediction.mean[:, 0]
networks = 1.96 * prediction.epistemic_std[:, 0]
low, high = prediction.interval(0.95)
bands = {
    "95 %, with noise": (low[:, 0], high[:, 0]),
    "95 %, networks": (mean - networks, mean + networks),
}
for label, ends in bands.items():
    axes.fill_between(places, *ends, color="C0", alpha=0.25, linewidth=0, label=label)
axes.plot(places, mean, color="C0", label="mean")
axes.plot(places, curve(places), "--", color="black", linewidth=1, label="truth")
axes.plot(x, y, ".", color="C1", markersize=3, label="data")
axes.set(xlim=(-3, 3), ylim=(-3, 3), xlabel="x", ylabel="y")
axes.legend(fontsize="small", ncols=2, loc="upper center")

# %%
# Do the intervals hold?
# ----------------------
# Of fresh data where the network had data, 95 % should lie in the interval.

fresh_x, fresh_y = draw(5000)
low, high = bnn.predict(fresh_x, num_samples=200, likelihood=nll).interval(0.95)
held = (low <= fresh_y) & (fresh_y <= high)
print(f"held by the interval: {held.float().mean():.1%}")

# %%
# They hold more: with few data a variational posterior underfits, and what it does not
# fit is taken for noise.
#
# What to trust
# -------------
# Where there are data, the noise dominates, and the interval can be checked, as above.
# Farther out the band comes from the prior and the shape of the network: another prior,
# or ``nn.Tanh`` in place of ``nn.ReLU``, gives another one, and nothing in the data
# says which is right. In a gap between data the band of independent Gaussians is too
# narrow as a rule. Take it as a sign that an input is far from the data, and not as a
# probability.

plt.show()
