"""A model, how its data are read, and what its output means: what the commands that run it have in common."""

__all__ = ["Work"]

import argparse
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.save_load import load
from ..errors import ArgumentError
from ..model import BayesianModel
from ..prediction.batches import batches_of, called_with, labelled_batches_of
from ..prediction.eval_mode import evaluating
from .data import Examples, Request, read_data
from .data.preprocessing import Preprocessing, preprocessing_of
from .guesses import guessed_likelihood, known_classes
from .history import recalled
from .meaning import Meaning
from .options import model_of
from .screen import Screen


@dataclass
class Work:
    """The model of a command and its data.

    Attributes:
        bnn: The model, on its device.
        options: The command line.
        screen: Where output goes.
        request: How to read data.
        preprocessing: What is done to images.
        meaning: What the output means; :meth:`read` finds out what nobody said.
        seconds: What one network takes for a batch, as measured by :meth:`read`.
    """

    bnn: BayesianModel
    options: argparse.Namespace
    screen: Screen
    request: Request
    preprocessing: Preprocessing
    meaning: Meaning
    seconds: float = 0.0

    @classmethod
    def begin(cls, options: argparse.Namespace, screen: Screen) -> "Work":
        """Load the file; what the command line does not say, the history may."""
        bnn = load(options.file, model_of(options))
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            bnn = bnn.to(device)
        except (RuntimeError, AssertionError) as error:
            raise ArgumentError(f"--device {device}: {str(error).splitlines()[0]}") from error
        torch.manual_seed(options.seed)

        def said(option: str) -> Any:
            value = getattr(options, option)
            return recalled(bnn.history, option) if value is None else value

        origin = bnn.origin
        preprocessing = preprocessing_of(
            bnn.module, origin.recipe, recalled(bnn.history, "images"), options.size, options.mean, options.std
        )
        converted = recalled(bnn.history, "checkpoint")
        tokenizer = said("tokenizer") or (converted if converted and Path(converted).is_dir() else None)
        request = Request(
            preprocessing,
            said("target"),
            said("text"),
            None if tokenizer is None else Path(tokenizer),
            tuple(said("classes") or known_classes(origin)),
        )
        part = said("output_part")
        request = replace(request, features=tuple(recalled(bnn.history, "features") or ()))
        part = "logits" if part is None and origin.config is not None else part
        meaning = Meaning(said("likelihood") or "", part, said("class_dim"), said("noise"))
        request = replace(request, numbers=meaning.is_regression)
        return cls(bnn, options, screen, request, preprocessing, meaning)

    def read(self, source: str, labelled: bool | None = True, limit: int | None = None) -> Examples:
        """Read data, and look with one batch whether they and the network fit.

        Args:
            source: What to read.
            labelled: Whether with labels; None reads those that are there.
            limit: How many examples to take. Default: ``None``, all.

        Raises:
            ArgumentError: They cannot be read, have no labels, or do not fit.
        """
        examples = read_data(source, replace(self.request, labelled=labelled)).limited(limit, self.options.seed)
        if labelled and not examples.labelled:
            raise ArgumentError(f"`{source}` has no labels, and {self.options.command} needs them.")
        return self.fitted(examples, source)

    def fitted(self, examples: Examples, source: str) -> Examples:
        """Check ``examples``, give their targets the shape of the output, and find out what the output means."""
        batch = next(iter(examples.batches(self.options.batch_size)), None)
        if batch is None:
            raise ArgumentError(f"`{source}` has no examples.")
        found = self._output(batch)
        if not self.meaning.likelihood:
            self.meaning = replace(
                self.meaning, likelihood=guessed_likelihood(found, _targets(batch, examples), examples, self.bnn)
            )
        if self.meaning.likelihood == "logits":
            self._check_classes(found, examples, source)
        elif examples.targets is not None:
            mean = found[0] if isinstance(found, (tuple, list)) else found
            shape = (len(examples), *mean.shape[1:])
            if examples.targets.numel() == torch.Size(shape).numel():
                examples = replace(examples, targets=examples.targets.float().reshape(shape))
        if examples.classes and examples.targets is not None:
            self.request = replace(self.request, classes=examples.classes)
        if examples.features:
            self.request = replace(self.request, features=examples.features)
        return examples

    def residual_std(self, examples: Examples) -> float:
        """The rms of what the network at the posterior mean is off by: the noise if all of it were noise."""
        total, count = 0.0, 0
        with evaluating(self.bnn), torch.no_grad():
            for batch in examples.batches(self.options.batch_size):
                for arguments, target in labelled_batches_of([batch], self.bnn.module, self.options.command):
                    args, kwargs = arguments
                    found = self.meaning.chosen(_explained(self.bnn.module, args, kwargs))
                    if found.shape != target.shape:
                        raise ArgumentError(
                            f"The network returns the shape {tuple(found.shape)} for targets of shape "
                            f"{tuple(target.shape)}. Make them alike in the data."
                        )
                    total += (found - target).double().square().sum().item()
                    count += target.numel()
        return max(math.sqrt(total / max(count, 1)), 1e-6)

    def told(self, examples: Examples) -> dict[str, Any]:
        """What the history is to hold, so that the next command need not be told."""
        return {
            "data": self.options.data,
            "target": self.request.target,
            "text": self.request.text,
            "tokenizer": None if self.request.tokenizer is None else str(self.request.tokenizer),
            "classes": list(self.request.classes) or None,
            "features": list(self.request.features) or None,
            "images": None if examples.pictures is None else self.preprocessing.as_data(),
            "likelihood": self.meaning.likelihood,
            "output_part": self.meaning.output,
            "class_dim": self.meaning.class_dim,
            "noise": self.meaning.noise_std,
            "num_samples": self.options.num_samples,
            "seed": self.options.seed,
        }

    def describe(self, examples: Examples) -> None:
        """Say how the data are read and what the output is taken for."""
        if examples.pictures is not None:
            self.screen.note(f"images: {self.preprocessing} (--size, --mean, --std)")
        if examples.classes and len(examples.classes) <= 20:
            self.screen.note(f"classes: {', '.join(examples.classes)} (in the order of the outputs; --classes)")
        noise = self.meaning.noise_std
        known = "" if noise is None else f", noise {noise:.4g}"
        count = f"{len(examples):,} examples" if len(examples) else "the batches of a loader"
        self.screen.note(f"data: {count}; the output is read as {self.meaning.likelihood}{known} (--likelihood)")

    def _output(self, batch: Any) -> Any:
        """What the network at the posterior mean returns for a batch; the second call is timed."""
        found: Any = None
        for arguments in batches_of([batch], self.bnn.module):
            args, kwargs = arguments
            with evaluating(self.bnn), torch.no_grad(), called_with(self.bnn.module, arguments):
                for _ in range(2):
                    start = time.perf_counter()
                    found = self.meaning.chosen(_explained(self.bnn.module, args, kwargs))
                    if torch.cuda.is_available():
                        torch.cuda.synchronize()
                    self.seconds = time.perf_counter() - start
        return found

    def _check_classes(self, found: Any, examples: Examples, source: str) -> None:
        if not isinstance(found, Tensor) or found.ndim < 2:
            return  # the library says it better
        dim = self.meaning.class_dim
        count = found.shape[-1 if dim is None else dim]
        if self.request.classes and len(self.request.classes) != count:
            raise ArgumentError(f"The network has {count} classes, and {len(self.request.classes)} have names.")
        if examples.targets is None:
            return
        if examples.classes and len(examples.classes) != count:
            raise ArgumentError(
                f"`{source}` has {len(examples.classes)} classes ({', '.join(examples.classes[:8])}), and the network "
                f"{count}. If some are missing there, name all of them in the order of the outputs with --classes."
            )
        if examples.targets.numel() and int(examples.targets.max()) >= count:
            raise ArgumentError(
                f"`{source}` has the class number {int(examples.targets.max())}, and the network classes from 0 to "
                f"{count - 1}."
            )


def _explained(module: Any, args: Any, kwargs: Any) -> Any:
    try:
        return module(*args, **kwargs)
    except RuntimeError as error:
        shapes = [tuple(each.shape) for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ArgumentError(
            f"The network does not take these data, a batch of shape {', '.join(map(str, shapes))}: {reason}."
        ) from error


def _targets(batch: Any, examples: Examples) -> Tensor | None:
    """The targets, if there are any: of the user's own loader, those of its first batch."""
    if examples.targets is not None or isinstance(batch, Tensor):
        return examples.targets
    found = batch.get("labels") if isinstance(batch, Mapping) else batch[1] if len(batch) == 2 else None
    return found if isinstance(found, Tensor) else None
