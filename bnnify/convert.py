"""Convert a model into a Bayesian one, and collapse it back."""

__all__ = ["collapse", "convert"]

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .bayesian import become_aware, become_bayesian, become_plain
from .computed import copies, layer_weight
from .errors import ConversionError
from .estimators import DEFAULT, POINT
from .model import BayesianModel
from .parameters import BayesianParameter, Settings, is_bayesian, is_derived, settings_of
from .posterior import (
    Constant,
    NamedPosteriorStd,
    PosteriorStd,
    Relative,
    as_posterior_std,
    fan_in_scale,
    rho_from_std,
    rms_std,
)
from .prior import Posterior, Prior, as_prior
from .priors import Pretrained
from .refusals import refuse_model, refuse_parameter
from .registry import units_dim
from .report import FROZEN, ConversionReport, ReportEntry
from .selection import Holder, Select, Selection, Setting, holders_by_parameter, resolve, resolve_estimators

DEFAULT_PRIOR = Pretrained()
DEFAULT_POSTERIOR_STD = Relative(0.2, full_width=32)
DEFAULT_ESTIMATOR = DEFAULT


def convert(
    model: nn.Module,
    *,
    select: Select = None,
    exclude: str | Sequence[str] = (),
    prior: Setting[Prior] = DEFAULT_PRIOR,
    posterior_std: Setting[float | PosteriorStd | NamedPosteriorStd] = DEFAULT_POSTERIOR_STD,
    estimator: Setting[str] = DEFAULT_ESTIMATOR,
    inplace: bool = False,
    strict: bool = False,
) -> BayesianModel:
    """Make the layers of ``model`` Bayesian, with its weights as the means of the posterior N(μ, softplus(ρ)²).

    By default every Linear, Bilinear, Conv1/2/3d, ConvTranspose1/2/3d, MultiheadAttention and recurrent layer becomes
    Bayesian, and with it whatever is tied to one of their weights; normalisation layers, embeddings and frozen
    parameters are left alone. Every parameter keeps its name; beside ``conv1.weight`` stands ``conv1.weight_rho``.

    Args:
        model: Any module, on any device. It is deep-copied unless ``inplace``.
        select: What to convert instead: a glob, a list of globs, or ``(qualified_name, module) -> bool``. A glob that
            matches a module (``"layer4"``, ``"encoder.*"``) takes the layers in it; one that matches a parameter
            (``"fc.weight"``, ``"*.scale"``) takes exactly that parameter, whatever holds it, frozen or not.
        exclude: A glob or a list of globs: what to leave alone of what would be converted. Default: ``()``, nothing.
        prior: p(w). Default: ``Pretrained()``, centred on the pretrained weights.
        posterior_std: How σ starts: a number, ``Relative(fraction)``, ``Moped(delta)``, or a ``FisherStd``, which is
            made from data or from Adam's state. Default: ``Relative(0.2, full_width=32)``, a fifth of each tensor's rms
            and less for layers of few units.
        estimator: Where the noise is put: ``"reparameterization"``, one weight sample per forward; ``"local"``, on each
            element of the output; ``"flipout"``, a weight sample with random signs for each example. These two are
            for Linear and (transposed) convolutions; other layers use the weight sample, and the report says so.
            ``"point"`` puts no noise anywhere: the posterior is a point, and ``-log p(w)`` takes the place of the KL,
            so that training finds the maximum a posteriori. Default: ``"reparameterization"``.
        inplace: Convert ``model`` itself. A conversion that fails leaves it as it was. Default: ``False``.
        strict: Raise when a parameter is left alone for want of support. Default: ``False``.

    Each of ``prior``, ``posterior_std`` and ``estimator`` may be a mapping from globs to settings, of which the first
    that matches a parameter holds: ``prior={"fc.*": Gaussian(std=0.1)}``; where none matches, the default does.

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
    if isinstance(model, BayesianModel):
        model = model.module  # what is already Bayesian stays so, and is not wrapped twice
    refuse_model(model)
    if not inplace:
        model = _copy(model)
    holders = {
        parameter: places
        for parameter, places in holders_by_parameter(model).items()
        if not is_derived(places[0].module, places[0].attribute)
    }
    reasons = Selection(select, holders, exclude).reasons()
    chosen = {parameter: holders[parameter] for parameter, reason in reasons.items() if reason is None}
    if not chosen:
        raise ConversionError(_nothing_to_convert(model, reasons))
    priors = resolve("prior", prior, DEFAULT_PRIOR, chosen)
    stds = resolve("posterior_std", posterior_std, DEFAULT_POSTERIOR_STD, chosen)
    estimators = resolve_estimators(estimator, DEFAULT_ESTIMATOR, chosen)
    # Everything that can fail comes before the first change to the model.
    posteriors = {
        parameter: _start(parameter, places, priors[parameter], stds[parameter], *estimators[parameter])
        for parameter, places in chosen.items()
    }
    report = _report(holders, reasons, posteriors)
    if strict:
        _refuse_unsupported(report)
    for parameter, places in chosen.items():
        for place in places:
            posteriors[parameter].move_into(place)
    for module in model.modules():
        become_aware(module)
    return BayesianModel(model, report)


def collapse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The posterior mean as a plain model: the original classes, keys and parameters.

    Args:
        model: A :class:`BayesianModel`, or any module that contains converted ones.
        inplace: Collapse the module itself instead of a deep copy. Default: ``False``.

    Example::

        >>> type(bnnify.collapse(bnnify.convert(nn.Linear(3, 2))))
        <class 'torch.nn.modules.linear.Linear'>
    """
    module = model.module if isinstance(model, BayesianModel) else model
    if not inplace:
        module = _copy(module)
    for child in module.modules():
        if is_bayesian(child):
            become_plain(child)
    return module


@dataclass(frozen=True)
class _NewPosterior:
    """A posterior that is ready to move into the modules that hold its mean; making it has changed nothing."""

    settings: Settings
    rho: nn.Parameter | None
    prior_mean: nn.Parameter | None
    asked: str = ""
    """The settings in words, where what was asked for says more than what is kept."""

    @property
    def description(self) -> str:
        return self.asked or str(self.settings)

    @property
    def memory(self) -> int:
        """What is new, in bytes."""
        return sum(tensor.nbytes for tensor in (self.rho, self.prior_mean) if tensor is not None)

    def move_into(self, place: Holder) -> None:
        if place.attribute not in settings_of(place.module):
            become_bayesian(place.module, place.attribute, self.settings.copy(), self.rho, self.prior_mean)


def _start(
    parameter: Tensor, places: Sequence[Holder], prior: object, posterior_std: object, estimator: str, instead: str
) -> _NewPosterior:
    """The posterior with which ``parameter`` starts, or the one it has if it is tied to what is Bayesian already."""
    for place in places:
        if place.attribute in settings_of(place.module):
            there = BayesianParameter(place.names[0], place.module, place.attribute)
            return _NewPosterior(there.settings, there.rho, there.prior_mean)  # type: ignore[arg-type]
    for place in places:
        refuse_parameter(place.module_names[0], place.module, place.attribute, parameter)
    rule: Any = as_posterior_std(posterior_std)
    prior = as_prior(prior)
    layer = places[0].layer
    scale, dim = fan_in_scale(layer_weight(layer, parameter)), units_dim(layer, parameter)
    settings = Settings(prior, rule, estimator, scale=scale, units_dim=dim, instead=instead)
    asked, start = str(settings), None
    if isinstance(rule, NamedPosteriorStd):
        names = [name for place in places for name in place.names]
        start = rho_from_std(rule.of(names, parameter.detach(), scale, dim).to(parameter.dtype)).contiguous()
        settings.posterior_std = Constant(rms_std(start))  # of σ, all that settings and files keep is its size
    rho = settings.initial_rho(places[0].names[0], parameter)
    settings.initial_std = rms_std(rho)
    rho = rho.expand_as(parameter).contiguous() if start is None else start
    prior_mean = nn.Parameter(parameter.detach().clone(), requires_grad=False) if prior.centred else None
    if estimator == POINT:
        prior.penalty(Posterior(parameter, None, prior_mean, settings.initial_std))  # which may refuse
        return _NewPosterior(settings, None, prior_mean)
    return _NewPosterior(settings, nn.Parameter(rho), prior_mean, asked)


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model, copies(model))
    except Exception as error:
        raise ConversionError(
            f"Cannot deep-copy the model ({type(model).__name__}): {error} "
            "Pass inplace=True to change the model itself."
        ) from error


def _report(
    holders: dict[Tensor, list[Holder]],
    reasons: dict[Tensor, str | None],
    posteriors: dict[Tensor, _NewPosterior],
) -> ConversionReport:
    return ConversionReport(
        tuple(
            ReportEntry(
                name=places[0].names[0],
                module=type(places[0].module).__name__,
                shape=tuple(parameter.shape),
                bayesian=parameter in posteriors,
                reason=reasons[parameter] or "",
                settings=posteriors[parameter].description if parameter in posteriors else "",
                memory=parameter.nbytes,
                added_memory=posteriors[parameter].memory if parameter in posteriors else 0,
            )
            for parameter, places in holders.items()
        )
    )


def _refuse_unsupported(report: ConversionReport) -> None:
    if unsupported := [entry for entry in report.left_alone if entry.unsupported]:
        listing = "; ".join(f"`{entry.name}` ({entry.module}): {entry.reason}" for entry in unsupported)
        raise ConversionError(f"strict=True, but these parameters were left alone: {listing}.")


def _nothing_to_convert(model: nn.Module, reasons: dict[Tensor, str | None]) -> str:
    found = f"Nothing to convert in the model ({type(model).__name__}): "
    if not reasons:
        return found + "it has no parameters."
    if FROZEN in reasons.values():
        return found + "every layer that could be converted is frozen. Set requires_grad, or select parameters by name."
    listing = "; ".join(dict.fromkeys(reason for reason in reasons.values() if reason))
    return found + f"its {len(reasons)} parameters were left alone ({listing}). Name what to convert with `select`."
