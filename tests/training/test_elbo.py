"""The ELBO: its value and gradient, its meaning over an epoch, and what it refuses."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnnify


def test_value_is_the_nll_plus_the_kls_share_of_one_datum():
    for num_data in [1, 128, 50_000, 50_000.0, 10**12]:
        for beta in [0, 0.1, 1, 1.0, 2.5]:
            nll, kl = torch.tensor(0.75, dtype=torch.float64), torch.tensor(3000.0, dtype=torch.float64)
            assert bnnify.elbo(nll, kl, num_data, beta).item() == pytest.approx(
                0.75 + beta * 3000 / num_data, rel=1e-14
            )


def test_gradient_reaches_both_terms_with_their_weights():
    nll, kl = torch.tensor(0.75, requires_grad=True), torch.tensor(3000.0, requires_grad=True)
    bnnify.elbo(nll, kl, num_data=200, beta=0.5).backward()
    assert nll.grad == 1
    assert kl.grad == torch.tensor(0.5 / 200)


def test_half_precision_nll_does_not_round_the_kl():
    loss = bnnify.elbo(torch.tensor(1.0, dtype=torch.float16), torch.tensor(1e6), num_data=10**9)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1.001, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 4, 6, 24])
def test_the_mean_over_an_epochs_batches_is_the_elbo_of_the_whole_data_set_per_datum(batch_size):
    bnn = bnnify.convert(nn.Linear(3, 5, dtype=torch.float64), prior=bnnify.Gaussian(std=0.5))
    x, y = torch.randn(24, 3, dtype=torch.float64), torch.randint(5, (24,))
    parameters = [parameter for parameter in bnn.parameters() if parameter.requires_grad]

    def with_gradient(loss):
        return [loss.detach(), *torch.autograd.grad(loss, parameters, retain_graph=True)]

    with bnn.draw():
        whole = F.cross_entropy(bnn.module(x), y, reduction="sum") + bnn.kl()
        losses = []
        for batch_x, batch_y in zip(x.split(batch_size), y.split(batch_size), strict=True):
            output, kl = bnn(batch_x)
            losses.append(bnnify.elbo(F.cross_entropy(output, batch_y), kl, num_data=len(x)))
    torch.testing.assert_close(with_gradient(torch.stack(losses).mean()), with_gradient(whole / len(x)))


@pytest.mark.parametrize("prior", [bnnify.Gaussian(), bnnify.ScaleMixture()], ids=str)
def test_several_draws_give_the_mean_of_their_elbos(prior):
    bnn = bnnify.convert(nn.Linear(3, 5, dtype=torch.float64), prior=prior)
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randint(5, (6,))
    draws = [bnn(x) for _ in range(4)]
    nlls = torch.stack([F.cross_entropy(output, y) for output, _ in draws])
    kls = torch.stack([kl for _, kl in draws])
    found = bnnify.elbo(nlls, kls, num_data=6)
    one_by_one = [bnnify.elbo(nll, kl, num_data=6) for nll, kl in zip(nlls, kls, strict=True)]
    parameters = [parameter for parameter in bnn.parameters() if parameter.requires_grad]
    torch.testing.assert_close(found, torch.stack(one_by_one).mean())
    torch.testing.assert_close(
        torch.autograd.grad(found, parameters, retain_graph=True),
        torch.autograd.grad(sum(one_by_one) / 4, parameters, retain_graph=True),
    )
    if not prior.needs_sample:
        torch.testing.assert_close(bnnify.elbo(nlls, kls[0], num_data=6), found)
    # The loss of the averaged output, which is another one, is smaller (Jensen's inequality).
    averaged = F.cross_entropy(torch.stack([output for output, _ in draws]).mean(0), y)
    assert averaged < nlls.mean()


def test_what_is_not_reduced_is_refused_with_the_shapes_found():
    for nll, kl in [((), (3,)), ((2,), (3,)), ((2, 2), ()), ((2, 2), (2,))]:
        with pytest.raises(ValueError, match="two scalars, or one of each for every draw") as error:
            bnnify.elbo(torch.zeros(nll), torch.zeros(kl), num_data=10)
        assert str(nll) in str(error.value)
        assert str(kl) in str(error.value)
        assert "reduction='mean'" in str(error.value)


def test_num_data_must_be_a_positive_integer():
    for num_data in [0, -1, 0.5, 10.5, True, math.nan, math.inf]:
        with pytest.raises(ValueError, match=f"positive integer, not {num_data!r}. It is not the batch size"):
            bnnify.elbo(torch.tensor(1.0), torch.tensor(1.0), num_data=num_data)


def test_beta_must_not_be_negative():
    for beta in [-1, -1e-9, math.nan]:
        with pytest.raises(ValueError, match=f"beta must not be negative, and is {beta!r}"):
            bnnify.elbo(torch.tensor(1.0), torch.tensor(1.0), num_data=10, beta=beta)


def test_the_geometric_weights_average_one_over_an_epoch_and_halve_from_batch_to_batch():
    for batches in [1, 2, 7, 60, 5000]:
        weights = [bnnify.geometric_weight(batch, batches) for batch in range(batches)]
        assert sum(weights) / batches == pytest.approx(1.0, rel=1e-12)
        assert all(later == pytest.approx(earlier / 2) for earlier, later in itertools.pairwise(weights))


def test_the_geometric_weight_is_the_formula_of_the_paper():
    for i in range(1, 9):
        assert bnnify.geometric_weight(i - 1, 8) == pytest.approx(8 * 2 ** (8 - i) / (2**8 - 1), rel=1e-14)


def test_a_batch_that_is_not_of_the_epoch_is_refused():
    for batch, batches in [(-1, 3), (3, 3), (0, 0)]:
        with pytest.raises(ValueError, match=f"found {batch} of {batches}"):
            bnnify.geometric_weight(batch, batches)


def test_the_warmup_is_a_line_and_then_constant():
    assert [bnnify.linear_warmup(step, 10, final=0.5) for step in (0, 5, 10, 1000)] == [0.0, 0.25, 0.5, 0.5]
    assert bnnify.linear_warmup(0, 0) == 1.0
    with pytest.raises(ValueError, match="step=-1"):
        bnnify.linear_warmup(-1, 10)
