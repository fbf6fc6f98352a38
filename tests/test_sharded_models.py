"""What reads or changes a whole model, on one whose parameters are sharded: it does what it does on one process."""

import copy

import pytest
import torch

import bnnify
from bnnify.distributions.gaussian import is_pruned
from bnnify.modules.parameters import unique_bayesian_parameters

from .draws.test_sharding import batch_of, convert, full, network, objective, shard, split_one_layer
from .processes import needs_processes

pytestmark = needs_processes


def everything(bnn):
    return {name: full(tensor).detach().clone() for name, tensor in bnn.module.state_dict().items()}


def assert_same(bnn, reference):
    torch.testing.assert_close(everything(bnn), everything(reference), rtol=0, atol=0)
    torch.testing.assert_close(bnn.kl(), reference.kl())


def weights_are_loaded_into_shards(rank, parallelize):
    for rule in 0.1, bnnify.Relative(0.1):
        own = bnnify.convert(network(seed=1), posterior_std=0.3).module.state_dict()
        for given in own, network(seed=1).state_dict():  # with ρ, and without, where σ starts anew
            reference, bnn = (bnnify.convert(network(), posterior_std=rule) for _ in range(2))
            bnnify.load_weights(reference, given)
            parallelize(bnn)
            bnn(batch_of(rank))  # after which FSDP may leave gathered parameters in place
            parameters = _sharded(bnn)
            bnnify.load_weights(bnn, given)
            assert_same(bnn, reference)
            assert all(a is b for a, b in zip(_sharded(bnn), parameters, strict=True))  # which an optimizer may hold
            optimizer = torch.optim.SGD(bnn.parameters(), lr=0.1)
            objective(bnn, batch_of(rank)).backward()
            before = everything(bnn)
            optimizer.step()
            assert not torch.equal(everything(bnn)["0.weight"], before["0.weight"])


def _sharded(bnn):
    list(unique_bayesian_parameters(bnn.module))  # FSDP puts them in their places
    return list(bnn.parameters())


def a_file_that_does_not_fit_changes_nothing(rank):
    bnn = shard(convert(posterior_std=0.1))
    before = everything(bnn)
    wrong = network(seed=1).state_dict()
    wrong["2.weight"] = torch.zeros(7, 5)
    with pytest.raises(bnnify.CheckpointError, match=r"of another shape: 2\.weight \(7, 5\) for \(5, 5\)"):
        bnnify.load_weights(bnn, wrong)
    torch.testing.assert_close(everything(bnn), before, rtol=0, atol=0)
    bnn(batch_of(rank))


def shards_are_pruned_by_one_threshold(rank, parallelize):
    for per_layer in False, True:
        reference = bnnify.convert(network(), posterior_std=0.1)
        bnn = copy.deepcopy(reference)
        parallelize(bnn)
        for fraction in 0.3, 0.6:
            expected = bnnify.prune(reference, fraction, per_layer=per_layer)
            bnn(batch_of(rank))
            assert str(bnnify.prune(bnn, fraction, per_layer=per_layer)) == str(expected)
            assert_same(bnn, reference)
        objective(bnn, batch_of(rank)).backward()
        for parameter in unique_bayesian_parameters(bnn.module):
            pruned, gradient = is_pruned(full(parameter.rho)), full(parameter.mean.grad)
            assert gradient.isfinite().all()
            assert (gradient[pruned] == 0).all()


@pytest.mark.parametrize("what", [weights_are_loaded_into_shards, shards_are_pruned_by_one_threshold])
@pytest.mark.parametrize("parallelize", [shard, split_one_layer])
def test_a_sharded_model_is_changed_as_one_on_one_process(what, parallelize, in_processes):
    in_processes(what, parallelize)


def what_would_break_fsdp_is_refused_and_changes_nothing(rank):
    for warm in False, True:
        bnn = shard(bnnify.convert(network(), posterior_std=0.1))
        if warm:
            bnn(batch_of(rank))
        before = everything(bnn)
        calls = (bnnify.collapse, {}), (bnnify.collapse, {"inplace": True}), (bnnify.freeze, {"num_samples": 2})
        for function, options in calls:
            with pytest.raises(bnnify.ConversionError, match=r"`0` \(FSDPBayesianLinear\): FSDP2 shards its `weight`"):
                function(bnn, **options)
        with pytest.raises(bnnify.ArgumentError, match=r"cannot run 2 networks.*its parameters are sharded"):
            bnn.predict(batch_of(rank), 4, networks_at_once=2)
        with pytest.raises(bnnify.ArgumentError, match=r"closed_form=True.*`0\.weight` is sharded"):
            bnn.predict(batch_of(rank), 4, closed_form=True)
        torch.testing.assert_close(everything(bnn), before, rtol=0, atol=0)
        bnn(batch_of(rank))


@pytest.mark.parametrize(
    "what", [a_file_that_does_not_fit_changes_nothing, what_would_break_fsdp_is_refused_and_changes_nothing]
)
def test_each_holds_in_two_processes(what, in_processes):
    in_processes(what)
