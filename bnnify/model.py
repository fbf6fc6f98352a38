"""A converted model: calling it draws one network and returns its output and the KL."""

__all__ = ["BayesianModel", "call_in_draw", "check_converted", "stacked"]

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .draws.draw import Draw
from .draws.estimators import ESTIMATORS, Estimator
from .draws.outputs import remember, take_off_copied_hooks
from .draws.sharding import is_distributed
from .errors import ArgumentTypeError, check_num_samples, describe
from .modules.parameters import BayesianParameter, bayesian_parameters, unique_bayesian_parameters
from .prediction.averages import Prediction
from .prediction.batches import called_with
from .prediction.known_likelihoods import LikelihoodLike
from .prediction.predict import predict
from .prediction.sampler import Sampler
from .report import ConversionReport
from .torch_internals import tree_map

_OF_TRANSFORMERS = {
    "activation_checkpointing_disable",
    "activation_checkpointing_enable",
    "config",
    "enable_input_require_grads",
    "generation_config",
    "gradient_checkpointing_disable",
    "gradient_checkpointing_enable",
    "is_activation_checkpointing",
    "is_gradient_checkpointing",
    "main_input_name",
    "supports_gradient_checkpointing",
}
"""What the trainers of Hugging Face ask a model for, and a converted one answers with what its module says."""


class BayesianModel(nn.Module):
    """A model whose weights have a posterior; :func:`bnnify.convert` makes it.

    Args:
        module: A module that contains converted ones.
        report: The report of the conversion. Default: an empty one.

    Attributes:
        module: The model itself. Calling it outside a draw gives the posterior mean, which is the original network.
            Its ``state_dict`` has the original keys plus ``*_rho``, ``*_prior_mean``, ``*_prior_std`` and
            ``*_initial_std``.
        report: The report of the conversion.
        origin: The file that the weights came from, which :func:`bnnify.save` records; None if from none.
        history: What the command did with the model, the oldest first: plain data, which :func:`bnnify.save` records.
        decisions: What :mod:`bnnify.decisions` fitted for this posterior, by names of the user's, such as
            ``bnn.decisions["temperature"]``, which :func:`bnnify.save` records too. They are not applied by themselves,
            and have to be fitted again after the weights or σ have changed.
    """

    def __init__(self, module: nn.Module, report: ConversionReport | None = None) -> None:
        super().__init__()
        self.module = module
        self.report = report or ConversionReport()
        self.origin: Any = None
        self.history: list[dict[str, Any]] = []
        self.decisions: dict[str, Any] = {}
        self.training = module.training

    def __getattr__(self, name: str) -> Any:
        # Nothing that runs the model is among them: outside a draw that would be the posterior mean, silently.
        return getattr(self.module, name) if name in _OF_TRANSFORMERS else super().__getattr__(name)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__({"history": [], "decisions": {}} | state)  # what an earlier release pickled has none
        for module in self.modules():
            take_off_copied_hooks(module)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """Apply one network from the posterior to the input.

        Inside :meth:`draw` it is that draw's network, otherwise a fresh one; gradients flow to means and ρ.

        Returns:
            The output, with whatever structure the model gives it, and KL(q‖p) in nats, summed over all weights. The
            output of n forwards is n draws, but the KL is the same in each: it is a property of the posterior. Only
            under a prior without a closed form is it an estimate from the draw.
        """
        return call_in_draw(self.module, self.module, *args, **kwargs)

    def kl(self) -> Tensor:
        """KL(q‖p) in nats, summed over all weights, a tied one once; a scalar in float32 or better, with gradient.

        Of a sharded model every rank has a part: all of them have to call this, or those that do wait for the others.
        """
        return _sum([parameter.kl() for parameter in unique_bayesian_parameters(self)])

    def draw(self) -> Draw:
        """Draw one network, in effect for everything that is done in the ``with`` block by this thread or task.

        Draws nest; leaving one restores what was in effect before. The draw may be entered again, for the same network.
        A generator that yields in the block leaves the draw in effect for its caller: see :class:`Draw`.

        Example::

            >>> with bnn.draw():
            ...     same = torch.equal(bnn(x)[0], bnn.module(x))
            >>> same
            True
        """
        # A list: the compiler of torch 2.12 stumbles over a generator here.
        return Draw(list(bayesian_parameters(self)), outputs_of=self.module)

    def sample(self, *args: Any, num_samples: int, **kwargs: Any) -> Any:
        """Call ``num_samples`` networks from the posterior, with gradient and in the current train/eval mode.

        Returns:
            The model's output structure, in which each tensor of shape ``(...)`` has become ``(num_samples, ...)`` and
            every other leaf a list.

        Raises:
            ArgumentError: ``num_samples`` is not a positive integer.
            ArgumentTypeError: The model cannot be called with these arguments.
        """
        check_num_samples(num_samples)
        sampler, outputs = Sampler(self.module, gradients=True), []
        for number in range(num_samples):
            with sampler.draw(number), called_with(self.module, (args, kwargs)):
                outputs.append(self.module(*args, **kwargs))
                remember(outputs[-1])
        return stacked(outputs)

    def predict(
        self,
        inputs: Any,
        num_samples: int = 32,
        *,
        likelihood: LikelihoodLike = "values",
        output: str | int | Callable[[Any], Any] | None = None,
        class_dim: int | None = None,
        antithetic: bool = False,
        networks_at_once: int = 1,
        closed_form: bool = False,
        seed: int | None = None,
        progress: bool = False,
        group: Any = None,
    ) -> Prediction:
        """The predictive distribution over networks from the posterior; see :func:`bnnify.prediction.predict`."""
        return predict(
            self.module,
            inputs,
            num_samples,
            likelihood=likelihood,
            output=output,
            class_dim=class_dim,
            antithetic=antithetic,
            networks_at_once=networks_at_once,
            closed_form=closed_form,
            seed=seed,
            progress=progress,
            group=group,
        )

    def parameter_groups(
        self, lr: float, rho_lr: float | None = None, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer, with weight decay only where no prior does its work.

        The prior already pulls on the means; decay would pull on them twice. On ρ it would silently inflate σ.

        Args:
            lr: The learning rate of the means and of the deterministic parameters.
            rho_lr: The learning rate of ρ. Default: ``lr``. Ten times as much suits a trained network; in one that
                starts from scratch σ would grow faster than the means learn.
            weight_decay: For the deterministic parameters only. Default: ``0.0``.

        Returns:
            The groups named ``"means"``, ``"rho"`` and ``"deterministic"``, without the empty ones; each trainable
            parameter is in exactly one.
        """
        posteriors = list(unique_bayesian_parameters(self.module))
        means = {id(parameter.mean): parameter.mean for parameter in posteriors}
        rhos = {id(each): each for parameter in posteriors for each in parameter.companions.values()}
        priors = {id(each) for parameter in posteriors for each in parameter.of_prior.values()}  # which nothing trains
        known = means.keys() | rhos.keys() | priors
        others = {id(p): p for p in self.module.parameters() if id(p) not in known}
        groups: list[tuple[str, Mapping[int, Tensor], float, float]] = [
            ("means", means, lr, 0.0),
            ("rho", rhos, lr if rho_lr is None else rho_lr, 0.0),
            ("deterministic", others, lr, weight_decay),
        ]
        return [
            {"name": name, "params": trainable, "lr": group_lr, "weight_decay": decay}
            for name, parameters, group_lr, decay in groups
            if (trainable := [parameter for parameter in parameters.values() if parameter.requires_grad])
        ]


def check_converted(caller: str, bnn: Any) -> None:
    """Raise an ArgumentTypeError unless ``bnn``, which was given to ``caller``, is a converted model."""
    if not isinstance(bnn, BayesianModel):
        raise ArgumentTypeError(
            f"{caller} takes a converted model, as bnnify.convert(model) gives it, not {describe(bnn)}."
        )


def call_in_draw(root: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
    """Call ``forward`` with one network drawn for it, and return its output and the KL in nats.

    Parameters for which a draw is in effect keep that.
    """
    # The KL comes before the forward, which under FSDP leaves parameters gathered for the backward.
    draw, kl = draw_with_kl(root, traced=torch.compiler.is_compiling())
    with draw:
        output = forward(*args, **kwargs)
        remember(output)
    return output, kl


def draw_with_kl(root: nn.Module, traced: bool = False) -> tuple[Draw, Tensor]:
    """Draw what one forward of ``root`` needs: a sample of each Bayesian parameter, or what its estimator keeps.

    ``traced`` says whether the code that calls this is being compiled.

    Returns:
        The draw, and KL(q‖p) in nats, summed over all weights; it is computed with the sample, in one function of
        autograd, where the prior allows it.
    """
    parameters = list(bayesian_parameters(root))
    kls: dict[int, Tensor] = {}

    def make(parameter: BayesianParameter) -> Tensor | Estimator:
        settings = parameter.settings
        estimator = ESTIMATORS[settings.estimator]
        # A prior may need the sample itself, and of a sharded parameter no rank has the whole.
        if estimator is not None and not settings.prior.needs_sample and not is_distributed(parameter.mean):
            return estimator(parameter.kept_mean, parameter.rho, parameter.name)
        both = parameter.sample_and_kl()
        if both is None:
            return parameter.sample()
        drawn, kls[id(parameter.mean)] = both
        return drawn

    draw = Draw(parameters, make, forward_of=root, traced=traced)
    with draw:  # whose samples a prior may need
        terms = {}  # in the order of the parameters, a tied one once
        for parameter in parameters:
            key = id(parameter.mean)
            if key not in terms:
                terms[key] = kls[key] if key in kls else parameter.kl()
        return draw, _sum([*terms.values()])


def _sum(terms: list[Tensor]) -> Tensor:
    """Sum scalars, whose devices may differ from one to the next."""
    return torch.stack([term.to(terms[0].device) for term in terms]).sum() if terms else torch.zeros(())


def stacked(outputs: list[Any]) -> Any:
    """Stack the tensors of ``outputs``, which are alike, along a new first dimension; list their other leaves."""

    def together(*leaves: Any) -> Any:
        return torch.stack(leaves) if all(isinstance(leaf, Tensor) for leaf in leaves) else list(leaves)

    return tree_map(together, *outputs)
