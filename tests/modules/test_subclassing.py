"""Becoming Bayesian wakes nobody: no class that reacts to being derived from, no hook, and no class stays for ever."""

import copy
import gc
import pickle
import weakref
from abc import ABC, ABCMeta, abstractmethod
from typing import Generic, TypeVar

import pytest
import torch
from torch import nn

import bnnify
from bnnify.modules.subclassing import quiet_subclass

T = TypeVar("T")
heard = []


class Registered(nn.Linear):
    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        heard.append(cls)


class Final(nn.Linear):
    def __init_subclass__(cls):
        raise TypeError("this class is final")


class WithArguments(nn.Linear):
    def __init_subclass__(cls, *, key):
        heard.append(key)


class Registering(type):
    def __new__(mcs, name, bases, namespace):
        heard.append(name)
        return super().__new__(mcs, name, bases, namespace)

    def __init__(cls, name, bases, namespace):
        heard.append(name)
        super().__init__(name, bases, namespace)


class OfMetaclass(nn.Linear, metaclass=Registering):
    pass


class RegisteringABC(ABCMeta):
    def __init__(cls, *args):
        heard.append(cls)
        super().__init__(*args)


class OfAbstractMetaclass(nn.Linear, metaclass=RegisteringABC):
    pass


class Abstract(ABC, nn.Linear):
    @abstractmethod
    def name(self): ...


class Concrete(Abstract):
    def name(self):
        return "concrete"


class OfType(nn.Linear, Generic[T]):
    pass


class WithSlots(nn.Linear):
    __slots__ = ("note",)


class Listening(nn.Linear):
    """A layer that hears of each parameter and of each attribute that is set, but for those of its own making."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.ready = True

    def register_parameter(self, name, parameter):
        if "ready" in self.__dict__:
            heard.append(name)
        super().register_parameter(name, parameter)

    def register_buffer(self, name, tensor, persistent=True):
        heard.append(name)
        super().register_buffer(name, tensor, persistent)

    def __setattr__(self, name, value):
        if "ready" in self.__dict__:
            heard.append(name)
        super().__setattr__(name, value)


CLASSES = (Registered, Final, WithArguments, OfMetaclass, OfAbstractMetaclass, Concrete, OfType, WithSlots, Listening)


@pytest.mark.parametrize(
    ("cls", "parametrized"),
    [
        *((cls, False) for cls in CLASSES),
        *((cls, True) for cls in CLASSES if cls not in (Final, WithArguments)),  # torch derives from these itself
    ],
)
def test_no_class_hears_that_its_modules_become_bayesian(cls, parametrized):
    layer = cls(3, 2)
    if parametrized:
        nn.utils.parametrizations.weight_norm(layer)
    heard.clear()
    bnn = bnnify.convert(layer, inplace=True)
    x = torch.ones(1, 3)
    assert isinstance(bnn.module, cls)
    assert not torch.equal(bnn(x)[0], bnn(x)[0])
    plain = bnnify.collapse(bnn, inplace=True)
    assert heard == []
    assert torch.equal(plain(x), layer(x))


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls is not Listening], ids=lambda cls: cls.__name__)
def test_copies_and_pickles_of_them_are_as_before(cls):
    bnn, x = bnnify.convert(cls(3, 2)), torch.ones(1, 3)
    heard.clear()
    for other in (copy.deepcopy(bnn), pickle.loads(pickle.dumps(bnn))):
        assert type(other.module) is type(bnn.module)
        assert torch.equal(other.module(x), bnn.module(x))
        assert type(bnnify.collapse(other)) is cls
    assert heard == []


def test_they_compile_as_one_graph():
    torch._dynamo.reset()
    bnn = bnnify.convert(nn.Sequential(Registered(3, 3), OfAbstractMetaclass(3, 3), OfType(3, 2)))
    compiled = torch.compile(bnn, backend="eager", fullgraph=True)
    x = torch.ones(1, 3)
    assert not torch.equal(compiled(x)[0], compiled(x)[0])
    torch.testing.assert_close(compiled(x)[1], bnn.kl())


def test_a_plain_layer_is_no_instance_of_an_abstract_class_made_bayesian():
    bnn = bnnify.convert(Concrete(3, 2))
    assert not isinstance(Concrete(3, 2), type(bnn.module))
    assert isinstance(bnn.module, Abstract)


def test_the_global_hooks_of_registration_are_not_called():
    registered, model = [], nn.Sequential(nn.Linear(3, 2))
    handles = [
        nn.modules.module.register_module_parameter_registration_hook(lambda *args: registered.append(args[1])),
        nn.modules.module.register_module_buffer_registration_hook(lambda *args: registered.append(args[1])),
    ]
    try:
        bnnify.convert(model, inplace=True)
    finally:
        for handle in handles:
            handle.remove()
    assert registered == []


def test_a_class_of_a_metaclass_gets_what_is_added_to_that():
    def refuse(cls, name):
        raise TypeError(name)

    made = quiet_subclass(OfMetaclass, "Guarded", {"name": 1}, {"__delattr__": refuse})
    with pytest.raises(TypeError, match="name"):
        del made.name
    assert isinstance(made, Registering)


@pytest.mark.parametrize("estimator", ["reparameterization", "local"])
def test_a_class_is_made_once_and_goes_with_its_last_module(estimator):
    class Local(nn.Linear):
        pass

    first, second = (bnnify.convert(Local(3, 2), estimator=estimator) for _ in range(2))
    assert type(first.module) is type(second.module)
    made = weakref.ref(type(first.module))
    del first, second
    gc.collect()
    assert made() is None


def test_the_classes_of_converted_graphs_go_with_them():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, 3))

        def forward(self, x):
            return x @ self.scale

    def converted():
        program = torch.export.export(Scaled(), (torch.ones(2, 3),))
        return bnnify.convert(program.module())

    bnn = converted()
    bnn(torch.ones(2, 3))
    classes = [weakref.ref(cls) for cls in (type(bnn.module), type(bnn.module)._plain_class)]
    del bnn
    gc.collect()
    gc.collect()  # the first one has let go of the class that was derived from the other
    assert [cls() for cls in classes] == [None, None]


def test_a_layer_with_many_weights_changes_its_class_once(monkeypatch):
    made = []
    monkeypatch.setattr(
        "bnnify.modules.bayesian_class.quiet_subclass", lambda *args: made.append(args[0]) or quiet_subclass(*args)
    )

    class Own(nn.LSTM):
        pass

    layer = nn.utils.parametrizations.weight_norm(nn.Linear(5, 2))
    bnnify.convert(nn.Sequential(Own(3, 5, num_layers=3, bidirectional=True), layer, Listening(3, 2)))
    assert len(made) == len(set(made))
    assert made.count(Own) == 1
