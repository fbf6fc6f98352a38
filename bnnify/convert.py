"""Convert a model into a Bayesian one, and collapse it back."""

__all__ = ["collapse", "convert", "convert_with"]

import copy
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from torch import Tensor, nn

from .distributions.initial_std import DEFAULT_POSTERIOR_STD, MeasuredStd, NamedPosteriorStd, PosteriorStd
from .distributions.prior import Prior
from .distributions.priors import Pretrained
from .errors import ConversionError, check_module
from .model import BayesianModel
from .modules.adapters import adapter_pairs
from .modules.class_change import NewPosterior, become_bayesian, become_plain, recompute_on_read
from .modules.computed_weights import detached_hook_weights
from .modules.conversion_report import conversion_report, nothing_to_convert, refuse_unsupported
from .modules.estimator_choice import fit_estimators
from .modules.holders import Holder, holders_by_parameter
from .modules.initial_posterior import initial_posterior, measure_rules, untrained_layer
from .modules.lora_std import DEFAULT_ADAPTER_STD
from .modules.parameters import is_derived
from .modules.posterior import PosteriorFamily
from .modules.present_posteriors import present_posterior, refuse_changes
from .modules.refusals import refuse_model, refuse_sharded
from .modules.selection import UNSET, Select, Selection, Setting, WhyNot, known_names, resolve
from .modules.settings import Settings, is_bayesian, slots_of
from .report import Reason

DEFAULTS = Settings(Pretrained(scale=5.0), DEFAULT_POSTERIOR_STD)
"""The settings of a parameter for which no option was given.

This σ is so small that it harmed no network that was tried. The prior beside it is wider, so that training can find a
larger one.
"""

_OF_GIVEN_STD = replace(DEFAULTS, prior=Pretrained())
"""Beside a σ that was chosen, or found from data, the prior is as wide as it."""


def convert(
    model: nn.Module,
    *,
    select: Select = None,
    exclude: str | Sequence[str] = (),
    prior: Setting[Prior] = UNSET,
    posterior_std: Setting[float | PosteriorStd | NamedPosteriorStd | MeasuredStd] = UNSET,
    posterior: Setting[PosteriorFamily] = UNSET,
    estimator: Setting[str] = UNSET,
    inplace: bool = False,
    strict: bool = False,
    for_writing: bool = False,
) -> BayesianModel:
    """Make the layers of ``model`` Bayesian, with its weights as the means of the posterior N(μ, softplus(ρ)²).

    By default every Linear, Bilinear, Conv1/2/3d, ConvTranspose1/2/3d, MultiheadAttention and recurrent layer becomes
    Bayesian, and with it whatever is tied to one of their weights; normalisation layers, embeddings and frozen
    parameters are left alone. Every parameter keeps its name; beside ``conv1.weight`` stands ``conv1.weight_rho``.

    Args:
        model: Any module, on any device. It is deep-copied unless ``inplace``.
        select: The layers or parameters to convert instead: a glob, a list of globs, or
            ``(qualified_name, module) -> bool``. A glob that matches a module (``"layer4"``, ``"encoder.*"``) takes the
            layers in it; one that matches a parameter (``"fc.weight"``, ``"*.scale"``) takes exactly that parameter,
            whatever holds it, frozen or not.
        exclude: A glob or a list of globs: what to leave alone of what would be converted. Default: ``()``, nothing.
        prior: p(w). Default: ``Pretrained()``, centred on the pretrained weights and as wide as σ, or
            ``Pretrained(scale=5.0)`` beside the default σ, which leaves room to learn a larger one. If the last of the
            layers looks untrained, as that of a network from scratch or a new head does, both are wider than the
            weights are large, so that training can move them; the report says so.
        posterior_std: How σ starts: a number, ``Relative(fraction)``, ``Moped(delta)``, a ``ResponseStd(data)``, which
            looks at what the data do in the model and is the better start, or a ``FisherStd``. Default:
            ``Relative(0.04)``, 4 % of each tensor's rms, which costs a network next to nothing and gains as little; for
            LoRA adapters ``LoraStd()``, by which the noise is 4 % of the weight that they adapt.
        posterior: The family of q(w). ``Point()`` is all at the mean: there is no noise, and ``-log p(w)`` takes the
            place of the KL, so that training finds the maximum a posteriori. Default: ``MeanField()``.
        estimator: Where the noise is put: ``"reparameterization"``, one weight sample per forward; ``"local"``, on each
            element of the output; ``"flipout"``, a weight sample with random signs for each example. These two are
            for Linear and (transposed) convolutions. Other layers use the weight sample, of which the report tells, and
            so do all under a prior whose KL is a Monte Carlo estimate. Default: ``"reparameterization"``.
        inplace: Convert ``model`` itself. A conversion that fails leaves it as it was. Default: ``False``.
        strict: Raise when a parameter is left alone for want of support: in a layer of a type that nobody has
            registered (see :func:`bnnify.register_layer`), or that cannot be converted. Default: ``False``.
        for_writing: Make a model that is only to be saved, whose prior means are the memory of the weights, and whose ρ
            is one number where it starts so: it takes up to two thirds less, and must not be trained. Default:
            ``False``.

    Each of these four settings may be a mapping from globs to values, of which the first that matches a parameter
    holds: ``prior={"fc.*": Gaussian(std=0.1)}``; where none matches, the default does.

    What is Bayesian already stays as it is, and ``convert(bnn)`` adds what is not yet. An option that would have to
    change it is refused: name in ``select``, or in the mapping, what is new; or collapse the model first.

    Returns:
        The model, wrapped so that calling it returns ``(output, kl_sum)``.

    Raises:
        ConversionError: The model, a layer or a setting cannot be converted; says which, what was found, what to do.

    References:
        Blundell et al. 2015, "Weight Uncertainty in Neural Networks", section 3.

    Example::

        >>> bnn = bnnify.convert(nn.Linear(3, 2))
        >>> output, kl = bnn(torch.ones(1, 3))
        >>> torch.equal(bnnify.collapse(bnn).weight, bnn.module.weight)
        True
    """
    root, holders = _prepare(model, inplace)
    why_not = Selection(select, holders, exclude).why_not()
    already = {
        parameter: there.settings for parameter, places in holders.items() if (there := present_posterior(places))
    }
    chosen = {p: holders[p] for p, reason in why_not.items() if reason is None or (p in already and reason.is_general)}
    given: dict[str, Any] = {"prior": prior, "posterior_std": posterior_std}
    given |= {"posterior": posterior, "estimator": estimator}
    if not chosen and (not already or select is not None or any(value is not UNSET for value in given.values())):
        raise ConversionError(nothing_to_convert(root, why_not))
    found: dict[str, dict[Tensor, Any]] = {option: resolve(option, value, chosen) for option, value in given.items()}
    rules = found["posterior_std"]
    with_rule = set(rules)
    for parameter, each in found["prior"].items():
        if isinstance(each, Prior) and each.posterior_std is not None and parameter not in already:
            rules.setdefault(parameter, each.posterior_std)
    for parameter in (factor for pair in adapter_pairs(root) for factor in (pair.down, pair.up)):
        if parameter in chosen and parameter not in already:
            rules.setdefault(parameter, DEFAULT_ADAPTER_STD)
    measured = measure_rules(root, rules, holders)
    settings = {
        parameter: replace(
            already.get(parameter, DEFAULTS if parameter not in with_rule else _OF_GIVEN_STD),
            **{option: values[parameter] for option, values in found.items() if parameter in values},
        )
        for parameter in chosen
    }
    fitted = fit_estimators(settings, chosen, estimator)
    refuse_changes(already, holders, why_not, found, fitted)
    wanted = {parameter: fitted[parameter] for parameter in chosen.keys() - already.keys()}
    unasked = {parameter: settings for parameter, settings in wanted.items() if parameter not in found["prior"]}
    bnn = _convert(model, root, holders, wanted, why_not, strict, unasked, for_writing)
    try:
        for rule in measured:
            rule.finish(bnn)
    except BaseException:
        if not already:
            collapse(bnn, inplace=True)
        raise
    return bnn


def convert_with(model: nn.Module, settings: Mapping[str, Settings], *, inplace: bool = False) -> BayesianModel:
    """Make the parameters of a plain model Bayesian that ``settings`` has by their qualified names.

    Each gets its prior, rule for σ, posterior and estimator from there; the rest is found out anew.

    Raises:
        ConversionError: The model has no parameter of that name, or it cannot be converted.
    """
    root, holders = _prepare(model, inplace)
    by_name = {name: parameter for parameter, places in holders.items() for place in places for name in place.names}
    unknown = next((name for name in settings if name not in by_name), None)
    if unknown is not None:
        raise ConversionError(f"There is no parameter `{unknown}` in the model; {known_names(holders)}.")
    chosen: dict[Tensor, Settings] = {}
    for name, each in settings.items():
        chosen.setdefault(by_name[name], each)  # of a tied one the first name counts
    wanted = fit_estimators(chosen, holders)
    not_selected = WhyNot(Reason.NOT_SELECTED, Reason.NOT_SELECTED.value)
    return _convert(model, root, holders, wanted, dict.fromkeys(holders, not_selected), strict=False)


def collapse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Turn a model into its posterior mean, a plain model with the original classes, keys and parameters.

    Args:
        model: A :class:`BayesianModel`, or any module that contains converted ones.
        inplace: Collapse the module itself instead of a deep copy. Default: ``False``.

    Raises:
        ArgumentTypeError: ``model`` is not a module.
        ConversionError: FSDP2 shards a Bayesian parameter, or the model cannot be copied.

    Example::

        >>> type(bnnify.collapse(bnnify.convert(nn.Linear(3, 2))))
        <class 'torch.nn.modules.linear.Linear'>
    """
    check_module("collapse(model)", model)
    module = model.module if isinstance(model, BayesianModel) else model
    refuse_sharded(module)
    if not inplace:
        module = _copy(module)
    for child in module.modules():
        if is_bayesian(child):
            become_plain(child)
    return module


_Holders: TypeAlias = dict[Tensor, list[Holder]]


def _prepare(model: nn.Module, inplace: bool) -> tuple[nn.Module, _Holders]:
    """Return the module to convert, a copy unless ``inplace``, and its parameters without those of posteriors."""
    root = model.module if isinstance(model, BayesianModel) else model
    refuse_model(root)
    if not inplace:
        root = _copy(root)
    holders = {
        parameter: places
        for parameter, places in holders_by_parameter(root).items()
        if not is_derived(places[0].module, places[0].attribute)
    }
    return root, holders


def _convert(
    given: nn.Module,
    root: nn.Module,
    holders: _Holders,
    wanted: Mapping[Tensor, Settings],
    why_not: Mapping[Tensor, WhyNot | None],
    strict: bool,
    unasked: Container[Tensor] = (),
    for_writing: bool = False,
) -> BayesianModel:
    """Give the wanted parameters, and whatever is tied to a Bayesian one, their posteriors.

    The prior of those that nobody asked for any is wide if the model looks untrained.
    """
    # Everything that can fail comes before the first change to the model.
    posteriors, descriptions = dict[Tensor, NewPosterior](), dict[Tensor, str]()
    untrained = untrained_layer(holders, wanted, unasked)
    for parameter, places in holders.items():
        if there := present_posterior(places):
            posteriors[parameter], descriptions[parameter] = there, str(there.settings)
        elif parameter in wanted:
            wide = bool(untrained) and parameter in unasked
            started = initial_posterior(parameter, places, wanted[parameter], wide, for_writing)
            posteriors[parameter], descriptions[parameter] = started
    report = conversion_report(holders, why_not, posteriors, descriptions, untrained)
    if strict:
        refuse_unsupported(report)
    new: dict[nn.Module, dict[str, NewPosterior]] = {}
    for parameter, posterior in posteriors.items():
        for place in holders[parameter]:
            if place.attribute not in slots_of(place.module):
                new.setdefault(place.module, {})[place.attribute] = posterior
    modules = list(root.modules())
    for module in reversed(modules):  # a layer after what its weights are computed from, which it looks at
        if module in new:
            become_bayesian(module, new[module])
    for module in modules:
        recompute_on_read(module)
    bnn = BayesianModel(root, report)
    if isinstance(given, BayesianModel):
        bnn.origin, bnn.history = given.origin, list(given.history)
    return bnn


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model, detached_hook_weights(model))
    except Exception as error:
        raise ConversionError(
            f"Cannot deep-copy the model ({type(model).__name__}): {str(error).partition(chr(10))[0][:300]} "
            "Pass inplace=True to change the model itself."
        ) from error
