"""Exports K networks of several architectures as one graph, in each format, and times the files in their runtimes.

Each file is compared with the networks themselves, which `bnnify.export` does before it leaves it there.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import bnnify
from bnnify.deployment.formats import FORMATS
from bnnify.prediction.batches import as_arguments

from ..harness import report
from ..harness.interleaved import interleaved
from ..harness.networks.cifar_resnet import resnet20
from ..harness.report import Table, digits


@dataclass(frozen=True)
class Network:
    """What is exported.

    Attributes:
        build: Makes it, without pretrained weights.
        inputs: Makes an example of what it is called with.
        output: Which part of its output. Default: all of it.
        select: Which parameters are Bayesian. Default: all that can be.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    output: str | int | None = None
    select: str | None = None


def images(size: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, 3, size, size)


def tokens() -> Tensor:
    return torch.randint(0, 1000, (2, 32))


def mobilenet() -> nn.Module:
    import timm

    return timm.create_model("mobilenetv3_small_050")


def vit() -> nn.Module:
    sizes = {"image_size": 64, "patch_size": 8, "num_layers": 4, "num_heads": 4, "hidden_dim": 128, "mlp_dim": 256}
    return torchvision.models.VisionTransformer(**sizes)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=128, n_layer=2, n_head=4, vocab_size=1000))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=1000))


NETWORKS = {
    "resnet18": Network(torchvision.models.resnet18, images(224)),
    "resnet18, only fc": Network(torchvision.models.resnet18, images(224), select="fc.*"),
    "ResNet-20": Network(resnet20, images(32)),
    "mobilenetv3_small_050 (timm)": Network(mobilenet, images(128)),
    "ViT, 4 layers": Network(vit, images(64)),
    "LSTM, 2 layers": Network(lambda: nn.LSTM(32, 64, 2), lambda: torch.randn(16, 2, 32), output=0),
    "GPT-2, 2 layers": Network(gpt2, tokens, output="logits"),
    "Llama, 2 layers": Network(llama, tokens, output="logits"),
}


@dataclass
class Result:
    """One file; times are in milliseconds, and None where it was not written, which ``error`` explains."""

    network: str
    format: str
    seconds: float | None = None
    nbytes: int | None = None
    least: int = 0
    max_difference: float | None = None
    ms: float | None = None
    loop_ms: float | None = None
    error: str = ""


def main() -> None:
    options = _options()
    run = report.Run(options, ["bnnify", "torch", "onnx", "onnxruntime", "onnxscript", "timm", "transformers"])
    results = run.collect(_results(options))
    headings = ["network", "format", "export, s", "MB", "× least", "largest difference", "ms", "× the K networks"]
    notes = [
        f"K = {options.samples} networks, batch of 2, float32; least: the deterministic weights once and the Bayesian "
        "ones K times; ms: a call in the runtime of the format, beside the K networks one after the other in torch"
    ]
    run.show(Table("Exported networks", headings, [_row(result) for result in results], names=2), notes=notes)


def _results(options: argparse.Namespace) -> Iterator[Result]:
    for name in options.networks:
        for form in options.formats:
            torch.manual_seed(0)
            yield _result(name, form, options)


def _result(name: str, form: str, options: argparse.Namespace) -> Result:
    network = NETWORKS[name]
    model, inputs = network.build().eval(), network.inputs()
    bnn = bnnify.convert(model, **({} if network.select is None else {"select": network.select}), inplace=True)
    frozen = bnnify.freeze(bnn, options.samples)
    tensors = {id(tensor): tensor for tensor in (*frozen.parameters(), *frozen.buffers())}
    result = Result(name, form, least=sum(tensor.nbytes for tensor in tensors.values()))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder, f"model{FORMATS[form].ending}")
        started = time.perf_counter()
        try:
            written = bnnify.export(frozen, path, inputs, output=network.output, format=form)
        except bnnify.BnnifyError as error:
            result.error = str(error)
            return result
        result.seconds = time.perf_counter() - started
        result.nbytes, result.max_difference = written.nbytes, written.max_difference
        execute, arguments = FORMATS[form].load(path, written.outputs), as_arguments(inputs)
        calls = {"file": lambda: execute(arguments), "loop": lambda: frozen(inputs)}
        times = interleaved(calls, rounds=options.rounds, warmup=1)
        result.ms, result.loop_ms = median(times["file"]), median(times["loop"])
    return result


def _row(result: Result) -> list[str]:
    if result.error:
        return [result.network, result.format, result.error, *[""] * 5]
    found: dict[str, Any] = asdict(result)
    return [
        *(result.network, result.format, digits(found["seconds"]), digits(found["nbytes"] / 1e6)),
        *(f"{found['nbytes'] / result.least:.2f}", f"{found['max_difference']:.0e}"),
        *(digits(found["ms"]), f"{found['ms'] / found['loop_ms']:.2f}"),
    ]


def _options() -> argparse.Namespace:
    parser = report.parser(__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["onnx", "torch.export"])
    parser.add_argument("--samples", type=int, default=4, help="K, the number of networks")
    parser.add_argument("--rounds", type=int, default=5, help="in which the timed calls take turns")
    return parser.parse_args()


if __name__ == "__main__":
    main()
