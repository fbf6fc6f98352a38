"""Counts the requests that one model answers in a second, to several threads at a time, with one image in each request.

The plain network is compared with K networks: drawn for each request by `predict`, or drawn once by `freeze`, one after
the other or as one graph.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median

import torch
import torchvision
from torch import Tensor, nn

import bnnify

from ..harness import report
from ..harness.networks.cifar_resnet import resnet20
from ..harness.networks.small_networks import mlp
from ..harness.report import Table, digits


@dataclass(frozen=True)
class Network:
    """What is served; ``select`` says which parameters are Bayesian, by default all that can be."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    select: str | None = None


NETWORKS = {
    "MLP 784-1200-1200-10": Network(lambda: mlp(1200, depth=2), (784,)),
    "ResNet-20": Network(resnet20, (3, 32, 32)),
    "resnet18 at 64×64, only fc": Network(torchvision.models.resnet18, (3, 64, 64), "fc.*"),
}


@dataclass
class Result:
    """Requests per second of one way to answer, with a number of threads that ask."""

    network: str
    way: str
    clients: int
    rate: float


def main() -> None:
    options = _options()
    run = report.Run(options, ["bnnify", "torch", "torchvision"])
    results = run.collect(_results(options))
    rates = {(result.network, result.way, result.clients): result.rate for result in results}
    rows = []
    for network in options.networks:
        rows.append([network])
        for way in dict.fromkeys(result.way for result in results):
            rows.append([way, *(digits(rates[network, way, clients]) for clients in options.clients)])
    headings = ["", *(f"{clients} thread{'s' * (clients > 1)}" for clients in options.clients)]
    notes = [f"K = {options.samples}; the median of {options.rounds} rounds of {options.seconds} s"]
    run.show(Table("Requests per second", headings, rows), notes=notes)


def _results(options: argparse.Namespace) -> Iterator[Result]:
    for name in options.networks:
        torch.manual_seed(0)
        ways, inputs = _ways(NETWORKS[name], options.samples)
        measured = [(way, clients) for clients in options.clients for way in ways]
        # All take turns, so that what else the machine does meets each of them.
        rounds = [
            {(way, clients): _rate(ways[way], inputs, clients, options.seconds) for way, clients in measured}
            for _ in range(options.rounds)
        ]
        for way, clients in measured:
            yield Result(name, way, clients, median(rates[way, clients] for rates in rounds))


def _ways(network: Network, samples: int) -> tuple[dict[str, Callable[[Tensor], object]], Tensor]:
    plain, inputs = network.build().eval(), torch.randn(1, *network.shape)
    bnn = bnnify.convert(plain, **({} if network.select is None else {"select": network.select}))
    frozen = bnnify.freeze(bnn, samples).eval()
    graph = frozen.as_graph(torch.randn(2, *network.shape))

    def averaged(networks: Callable[[Tensor], Tensor]) -> Callable[[Tensor], object]:
        return lambda inputs: networks(inputs).softmax(-1).mean(0)

    ways: dict[str, Callable[[Tensor], object]] = {
        "the plain network": lambda inputs: plain(inputs).softmax(-1),
        "predict": lambda inputs: bnn.predict(inputs, samples, likelihood="logits"),
        "freeze": averaged(frozen),
        "freeze, as one graph": averaged(graph),
    }
    return ways, inputs


def _rate(answer: Callable[[Tensor], object], inputs: Tensor, clients: int, seconds: float) -> float:
    """Requests per second of so many threads, each of which asks again as soon as it has its answer."""
    ready = threading.Barrier(clients)

    def ask() -> float:
        with torch.no_grad():
            answer(inputs)
            ready.wait()
            count, started = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - started) < seconds:
                answer(inputs)
                count += 1
        return count / elapsed

    with ThreadPoolExecutor(clients) as threads:
        return sum(each.result() for each in [threads.submit(ask) for _ in range(clients)])


def _options() -> argparse.Namespace:
    parser = report.parser(__doc__)
    parser.set_defaults(threads=1)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 16], help="how many threads ask at a time")
    parser.add_argument("--samples", type=int, default=10, help="K, the number of networks")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long each measurement takes")
    parser.add_argument("--rounds", type=int, default=5, help="in which all take turns")
    return parser.parse_args()


if __name__ == "__main__":
    main()
