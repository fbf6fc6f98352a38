"""The audit names what does not reach the output and what somebody replaces, and changes nothing."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

import bnnify
from tests import zoo


class Partial(nn.Module):
    """One layer is used, one is not, and one only where no gradient flows."""

    def __init__(self):
        super().__init__()
        self.used, self.unused, self.cut = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        with torch.no_grad():
            offset = self.cut(x)
        return {"y": self.used(x) + offset}


class Hypernetwork(nn.Module):
    """Runs `inner` with weights that another layer makes."""

    def __init__(self):
        super().__init__()
        self.inner, self.maker = nn.Linear(2, 2), nn.Linear(2, 4)

    def forward(self, x):
        made = self.maker(x.mean(0)).reshape(2, 2)
        return functional_call(self.inner, {"weight": made}, (x,))


class DeletingHypernetwork(Hypernetwork):
    """Takes the parameter out of its layer for the time of a forward."""

    def forward(self, x):
        kept = self.inner._parameters.pop("weight")
        self.inner.weight = self.maker(x.mean(0)).reshape(2, 2)
        try:
            return self.inner(x)
        finally:
            del self.inner.__dict__["weight"]
            self.inner._parameters["weight"] = kept


REACHING = ["encoder", "lstm", "tied_language_model", "partly_frozen", "dataclass", "object"]


@pytest.mark.parametrize("name", [*REACHING, "checkpointed", "checkpointed_reentrant"])
def test_every_parameter_that_influences_the_output_is_reached(name):
    plain, inputs = zoo.build(name)
    plain.eval()
    names = {id(parameter): name for name, parameter in plain.named_parameters()}
    zoo.loss(plain(*inputs)).backward()
    used = {names[id(parameter)] for parameter in plain.parameters() if parameter.grad is not None}
    bnn = bnnify.convert(plain)

    result = bnnify.audit(bnn, *inputs)

    assert set(result.reached) == used & {entry.name for entry in bnn.report.bayesian}
    assert not result.replaced
    assert bool(result) == bool(result.unreached)


def test_what_is_not_used_or_used_without_gradient_is_unreached():
    result = bnnify.audit(bnnify.convert(Partial()), torch.ones(1, 3))
    assert result.reached == ("used.weight", "used.bias")
    assert result.unreached == ("unused.weight", "unused.bias", "cut.weight", "cut.bias")
    assert "unreached: cut.bias" in str(result)


@pytest.mark.parametrize("model", [Hypernetwork, DeletingHypernetwork])
def test_a_replaced_parameter_is_named(model):
    result = bnnify.audit(bnnify.convert(model()), torch.ones(1, 2))
    assert result.replaced == ("inner.weight",)
    assert result.unreached == ("inner.weight",)
    assert result.reached == ("inner.bias", "maker.weight", "maker.bias")
    assert "replaced by another value: inner.weight" in str(result)


def test_a_second_audit_forgets_what_the_first_one_saw():
    model = Hypernetwork()
    bnn = bnnify.convert(model, inplace=True)
    assert bnnify.audit(bnn, torch.ones(1, 2))
    model.forward = lambda x: model.inner(x) + model.maker(x).sum()
    assert not bnnify.audit(bnn, torch.ones(1, 2))


def test_it_leaves_flags_buffers_and_gradients_as_they_were():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).train()
    bnn = bnnify.convert(model)
    bnn(torch.randn(4, 3))[0].sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in bnn.named_parameters() if parameter.requires_grad}
    before = {name: value.clone() for name, value in bnn.state_dict().items()}
    with torch.no_grad():
        bnnify.audit(bnn, torch.randn(4, 3))
    assert all(module.training for module in bnn.modules())
    assert all(torch.equal(before[name], value) for name, value in bnn.state_dict().items())
    assert all(torch.equal(gradient, bnn.get_parameter(name).grad) for name, gradient in gradients.items())


def test_frozen_posteriors_are_audited_too():
    bnn = bnnify.convert(nn.Linear(3, 2)).requires_grad_(False)
    assert bnnify.audit(bnn, torch.ones(1, 3)).reached == ("weight", "bias")


def test_a_tied_parameter_is_named_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert bnnify.audit(bnnify.convert(model), torch.ones(1, 3)).reached == ("0.weight", "0.bias", "1.bias")


def test_an_output_without_gradient_cannot_be_audited():
    class Decides(nn.Linear):
        def forward(self, x):
            return super().forward(x).argmax(-1)

    with pytest.raises(bnnify.DrawError, match="logits"):
        bnnify.audit(bnnify.convert(Decides(3, 2)), torch.ones(1, 3))


# The optimizer


def normalized():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def test_an_optimizer_of_the_converted_model_fits_it():
    bnn = bnnify.convert(normalized())
    result = bnnify.audit(bnn, torch.ones(2, 3), optimizer=torch.optim.SGD(bnn.parameter_groups(lr=0.1)))
    assert not result
    assert result.reached == ("0.weight", "0.bias")
    assert "optimizer" not in str(result)


def test_what_an_optimizer_made_before_the_conversion_does_not_hold_is_named():
    model = normalized()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bnn = bnnify.convert(model, inplace=True)
    result = bnnify.audit(bnn, torch.ones(2, 3), optimizer=optimizer)
    assert result.not_optimized == ("0.weight_rho", "0.bias_rho")
    assert result.not_in_model == ()
    assert "not in the optimizer: 0.weight_rho" in str(result)
    assert "make it from bnn.parameter_groups" in str(result)
    assert bool(result)
    assert len(result.reached) == 2


@pytest.mark.parametrize("named", [False, True])
def test_what_an_optimizer_of_the_original_of_a_copy_holds_is_named(named):
    model = normalized()
    bnn = bnnify.convert(model)
    held = model.named_parameters() if named else model.parameters()
    result = bnnify.audit(bnn, torch.ones(2, 3), optimizer=torch.optim.SGD(held, lr=0.1))
    assert {"0.weight", "0.weight_rho", "1.weight"} <= set(result.not_optimized)
    assert len(result.not_in_model) == 4
    assert result.not_in_model[0] == ("0.weight" if named else "group 0, parameter 0, a Parameter of shape (4, 3)")


def test_an_optimizer_is_looked_at_without_a_forward_where_no_input_is_given():
    bnn = bnnify.convert(normalized())
    bnn.module.register_forward_hook(lambda module, args, output: pytest.fail("it was called"))
    result = bnnify.audit(bnn, optimizer=torch.optim.SGD([bnn.module[0].weight], lr=0.1))
    assert result.not_optimized == ("0.bias", "0.weight_rho", "0.bias_rho", "1.weight", "1.bias")
    assert "reach" not in str(result)


def test_frozen_parameters_need_no_optimizer():
    bnn = bnnify.convert(normalized()).requires_grad_(False)
    assert not bnnify.audit(bnn, optimizer=torch.optim.SGD(bnn.parameters(), lr=0.1)).not_optimized
