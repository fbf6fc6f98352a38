"""Times K networks of a language model with Bayesian adapters: in one forward, one after another, and one alone."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch.nn import functional as F

import bnnify

from ..harness import comparison
from ..harness.comparison import Calls
from ..harness.interleaved import interleaved, summary
from ..harness.networks.language_model import language_model, smollm2

SHAPES = ((1, 8), (1, 32), (1, 128), (8, 32))
"""Texts, and tokens of each."""


def main() -> None:
    options = _options()
    run = comparison.begin(options)
    run.libraries = ("torch", "transformers", "peft")
    results: dict[str, Any] = {}
    notes = [f"{options.rounds} rounds; {comparison.RATIOS}"]
    dtype = getattr(torch, options.dtype)
    _, base = language_model(options.base, dtype) if options.base else smollm2(dtype)
    base.to(options.device)
    parameters = sum(parameter.numel() for parameter in base.parameters())
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    bnn = bnnify.convert(adapted, select="*.lora_*", inplace=True)
    for texts, tokens in options.shapes:
        ids = torch.randint(1000, (texts, tokens), device=options.device)
        description = f"{parameters / 1e6:.0f} M, {options.dtype}, texts × tokens: {texts} × {tokens}"
        for what, calls in (("predict", _predictions(bnn, ids, options.samples)), ("step", _steps(bnn, ids))):
            measured = interleaved(calls, options.rounds, options.device, warmup=1, at_least=0.0, description=what)
            results[f"{what}; {description}"] = summary(measured, [next(iter(calls))])
            seconds = {name: sorted(times)[len(times) // 2] / 1000 for name, times in measured.items()}
            notes.append(
                f"{what}; {description}: tokens per second: "
                + ", ".join(f"{name} {texts * tokens / time:,.0f}" for name, time in seconds.items())
            )
            run.record(results)
    run.show(comparison.ratio_table(f"Bayesian LoRA, K = {options.samples}", results), notes=notes)


def _predictions(bnn: bnnify.BayesianModel, ids: torch.Tensor, samples: int) -> Calls:
    """Predictions of the next token from one network and from several."""
    arguments = {"input_ids": ids, "use_cache": False, "logits_to_keep": 1}

    def of(count: int, at_once: int) -> Callable[[], object]:
        return lambda: bnn.predict(arguments, count, likelihood="logits", output="logits", networks_at_once=at_once)

    return {
        "1 network": of(1, 1),
        f"{samples} networks, one after another": of(samples, 1),
        f"{samples} networks at once": of(samples, samples),
    }


def _steps(bnn: bnnify.BayesianModel, ids: torch.Tensor) -> Calls:
    """Forward and backward of a step, with all tokens as targets."""

    def loss(model: Any) -> torch.Tensor:
        output = model(input_ids=ids, use_cache=False)
        output, kl = output if isinstance(output, tuple) else (output, torch.zeros(()))
        logits = output.logits[:, :-1].flatten(0, 1).float()
        return bnnify.elbo(F.cross_entropy(logits, ids[:, 1:].flatten()), kl, num_data=1000)

    return {"LoRA": lambda: loss(bnn.module).backward(), "Bayesian LoRA": lambda: loss(bnn).backward()}


def _shape(text: str) -> tuple[int, int]:
    texts, _, tokens = text.partition("x")
    return int(texts), int(tokens)


def _options() -> argparse.Namespace:
    parser = comparison.parser(__doc__)
    parser.add_argument("--base", type=Path, help="the folder of another language model, instead of SmolLM2-135M")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the base")
    parser.add_argument("--samples", type=int, default=10, help="K, the number of networks")
    parser.add_argument("--shapes", type=_shape, nargs="+", default=SHAPES, help="as in 8x32: texts and tokens")
    parser.set_defaults(rounds=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
