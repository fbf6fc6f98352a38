"""A starting σ from the Fisher information, which says how much the predictions depend on each weight."""

__all__ = ["FisherStd"]

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..distributions.gaussian import at_least_float32
from ..distributions.initial_std import NamedPosteriorStd, PosteriorStd, Relative, as_posterior_std
from ..errors import (
    ArgumentError,
    ArgumentTypeError,
    ConversionError,
    as_number,
    check_module,
    check_num_samples,
    check_positive,
    describe,
)
from ..model import BayesianModel
from ..prediction.batches import batches_of, check_batches
from ..prediction.eval_mode import evaluating
from ..prediction.known_likelihoods import LikelihoodLike, as_likelihood
from .adam_state import mean_squares
from .example_gradients import example_gradients, scores

_PRIOR_STD = Relative(0.2, full_width=32)
"""As much as a weight of little information may have, without the errors of all of them being too large together."""

_GRADIENTS = 2**28
"""The most numbers in the gradients of one chunk: 1 GiB in float32."""


@dataclass(frozen=True, eq=False)
class FisherStd:
    """``σ² = 1 / (N·F + 1/s²)``, elementwise: the Laplace approximation with a diagonal Fisher information.

    F is the expected square of the gradient of log p(y|x, w) for one datum, where y is drawn from the model. A weight
    that the predictions depend on gets a small σ, and any other gets s, the std of a Gaussian prior.
    Make one with :meth:`estimate` or :meth:`from_adam`, and give it to :func:`bnnify.convert`::

        fisher = FisherStd.estimate(model, train_loader, likelihood="logits")
        bnn = bnnify.convert(model, posterior_std=fisher)

    The converted model keeps the σ, not the rule: in its settings, and in files, stands the root mean square of each
    tensor's σ. That is the scale of a ``Pretrained`` prior, and the σ with which the posterior starts anew if other
    weights are loaded, to which F would not apply.

    Attributes:
        fisher: F of each parameter, by qualified name and of its shape.
        num_data: N, the number of data that the model was trained on.
        prior_std: s: a number, or a rule as for ``posterior_std``. Of a trained network most weights have so little
            information by themselves that s is what decides. Default: ``Relative(0.2, full_width=32)``. The scale of
            the weights themselves, ``Relative(1.0)``, would be too large for a network as converted: a diagonal does
            not know what the errors of all weights do together.

    References:
        Ritter et al. 2018, "A Scalable Laplace Approximation for Neural Networks", section 2 (the diagonal one).
    """

    fisher: Mapping[str, Tensor] = field(repr=False)
    num_data: int
    prior_std: float | PosteriorStd = _PRIOR_STD

    def __post_init__(self) -> None:
        if not isinstance(self.fisher, Mapping):
            raise ArgumentTypeError(
                f"FisherStd(fisher) must be a mapping of names to tensors, not {describe(self.fisher)}. "
                "FisherStd.estimate makes one."
            )
        as_number("FisherStd(num_data)", self.num_data, "It is the size of the training set: len(loader.dataset).")
        check_positive("FisherStd(num_data)", self.num_data)
        if isinstance(as_posterior_std(self.prior_std), NamedPosteriorStd):
            raise ConversionError("FisherStd(prior_std) must be a number or a rule that knows no names.")

    @classmethod
    def estimate(
        cls,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        num_data: int | None = None,
        prior_std: float | PosteriorStd = _PRIOR_STD,
        likelihood: LikelihoodLike = "values",
        output: str | int | Callable[[Any], Any] | None = None,
        class_dim: int | None = None,
        chunk_size: int | None = None,
    ) -> "FisherStd":
        """Estimate F in one pass over data, from the gradient of each example by itself, in eval mode.

        The labels in the data are not looked at: the Fisher information is an expectation over the model's own
        predictions, from which one label is drawn for each example. (The squared gradients of the true labels vanish
        where a network has fitted them; those of whole batches mix examples before they are squared.)

        Only parameters with ``requires_grad`` get an F. In half precision small gradients are lost: estimate on a
        float32 copy of such a model; the names are the same.

        Args:
            model: The trained model, before its conversion.
            loader: Any iterable of batches, of which the inputs are taken by the rule of
                :func:`bnnify.prediction.predict`; some thousand examples usually do. The first dimension of every
                tensor in the input and of the output counts examples.
            num_data: N, the examples in the whole training set, of which the loader may give a part. Default:
                ``len(loader.dataset)``.
            prior_std: See :class:`FisherStd`. Default: ``Relative(0.2, full_width=32)``.
            likelihood: What the output means, as in :func:`bnnify.tune_std`. The default, ``"values"``, is refused.
            output: Which part of the model's output: a key or attribute, an index, or a function. Default: all of it.
            class_dim: The dimension of the classes, as in ``predict``. Default: the last one.
            chunk_size: How many examples are differentiated at a time, by ``torch.func.vmap``; memory grows with it.
                With ``1`` it goes without vmap, which some models do not allow. Default: up to 32, as long as their
                gradients fit into 1 GiB.

        Raises:
            ArgumentError: The model has nothing to differentiate, the loader is empty or does not tell its number of
                data, tensors do not have examples along the first dimension, vmap cannot do the model, or the output
                cannot mean what the likelihood says or is not finite.
            ArgumentTypeError: An argument is of a wrong type; ``loader`` is one batch; or it is not clear what of a
                batch are inputs.
        """
        check_batches(loader, "FisherStd.estimate")
        check_module("FisherStd.estimate(model)", model)
        meaning = as_likelihood(likelihood, class_dim)
        if chunk_size is not None:
            check_num_samples(chunk_size, "FisherStd.estimate(chunk_size)")
        model = model.module if isinstance(model, BayesianModel) else model
        parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        if not parameters:
            raise ArgumentError(
                f"Cannot estimate the Fisher information of the model ({type(model).__name__}): "
                "none of its parameters has requires_grad."
            )
        if chunk_size is None:
            chunk_size = max(1, min(32, _GRADIENTS // sum(weight.numel() for weight in parameters.values())))
        num_data = _num_data(loader) if num_data is None else num_data
        sums = {name: torch.zeros_like(at_least_float32(weight.detach())) for name, weight in parameters.items()}
        seen = 0
        with evaluating(model):
            for inputs in batches_of(loader, model):
                of_output = scores(model, inputs, meaning, output)
                seen += len(of_output[0])
                for gradients in example_gradients(model, parameters, inputs, of_output, output, chunk_size):
                    for name, gradient in gradients.items():
                        sums[name] += at_least_float32(gradient).square().sum(0)
        if not seen:
            raise ArgumentError("FisherStd.estimate was given a loader without batches.")
        return cls({name: total / seen for name, total in sums.items()}, num_data, prior_std)

    @classmethod
    def from_adam(
        cls,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Mapping[str, Any],
        *,
        num_data: int,
        batch_size: int,
        prior_std: float | PosteriorStd = _PRIOR_STD,
    ) -> "FisherStd":
        """``F ≈ B · exp_avg_sq / (1 - β₂^t)``: read F off the state of Adam in a training checkpoint, without data.

        Adam averages the square of the batch's gradient. That of a mean over B examples is, in expectation, the square
        of the mean gradient, which is small towards the end of training, plus 1/B of the variance of a single example's
        gradient; B times it is therefore about the mean square of one example's. The division undoes that the average
        started from zero.

        This is the cheap estimate, not the better one: its gradients are those of the true labels, in train mode, of
        the weights of the last 1/(1 - β₂) steps, clipped if they were clipped, and with the decay that ``Adam`` (unlike
        ``AdamW``) adds to them.

        Args:
            model: The model that the optimizer has trained.
            optimizer: Adam, AdamW, NAdam or RAdam, or its ``state_dict()``. A bare state_dict does not tell which
                parameter is which unless they are all in one group, in the model's order, or were given by name; else
                make the optimizer as for the training, load the state_dict into it, and pass that.
            num_data: N, the examples in the training set.
            batch_size: B, the examples over which the loss of one step was the mean, on all devices together.
            prior_std: See :class:`FisherStd`. Default: ``Relative(0.2, full_width=32)``.

        Raises:
            ArgumentError: It is not the state of Adam, or not of this model.
            ArgumentTypeError: An argument is of a wrong type.
        """
        as_number("FisherStd.from_adam(batch_size)", batch_size)
        check_positive("FisherStd.from_adam(batch_size)", batch_size, ArgumentError)
        check_module("FisherStd.from_adam(model)", model)
        squares = mean_squares(model, optimizer)
        return cls({name: batch_size * square for name, square in squares.items()}, num_data, prior_std)

    def of(self, names: Sequence[str], weight: Tensor, scale: float, units_dim: int = 0) -> Tensor:
        """σ of the parameter that has these names in the model, of the shape of ``weight``.

        ``scale`` takes the place of the rms of a weight that is all zero; ``units_dim`` is the dimension of the output
        units.

        Raises:
            ConversionError: There is no F for it, or one of another shape, or F is not a number.
        """
        name = next((name for name in names if name in self.fisher), None)
        if name is None:
            known = ", ".join(f"`{known}`" for known in list(self.fisher)[:3])
            raise ConversionError(
                f"FisherStd has no information on `{names[0]}`, only on {len(self.fisher)} others ({known}, …). Was it "
                "frozen, or made for another model? Give it a rule of its own: posterior_std={pattern: rule}."
            )
        fisher = self.fisher[name].to(weight.device)
        if fisher.shape != weight.shape:
            raise ConversionError(
                f"FisherStd was made for another model: its information on `{name}` has the shape "
                f"{tuple(fisher.shape)}, and the parameter {tuple(weight.shape)}."
            )
        if weight.is_meta:
            raise ConversionError(f"FisherStd needs the weights, but `{name}` is on the meta device. Load them first.")
        if not (fisher >= 0).all():
            raise ConversionError(f"FisherStd: the information on `{name}` is negative or NaN in places.")
        rule: Any = as_posterior_std(self.prior_std)
        prior_std = rule(weight.movedim(units_dim, 0), scale)
        prior_std = prior_std.movedim(0, units_dim) if prior_std.ndim == weight.ndim else prior_std
        return (self.num_data * fisher + prior_std**-2).rsqrt()


def _num_data(loader: Iterable[Any]) -> int:
    try:
        return len(loader.dataset)  # type: ignore[attr-defined]
    except (AttributeError, TypeError):
        raise ArgumentError(
            f"The loader ({type(loader).__name__}) does not tell how many data there are. "
            "Pass num_data=, the number of examples in the training set."
        ) from None
