"""The models over which the contract is tested: small, and each with something that converters stumble over."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.contract.outputs import equal, tensors

__all__ = ["ZOO", "build", "equal", "loss", "tensors"]


@dataclass(frozen=True)
class Case:
    """A model and an input for it.

    Attributes:
        build: Makes the model; called under a fixed seed.
        inputs: Makes the positional arguments of one forward, in the model's dtype.
        compiles: Whether ``torch.compile(fullgraph=True)`` takes the plain model.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    compiles: bool = True


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randn(*shape, dtype=dtype),)


def tokens(*shape: int) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randint(0, 11, shape),)


class BasicBlock(nn.Module):
    """A residual block with a projection shortcut."""

    def __init__(self, inplanes: int, planes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride=2, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class TiedLanguageModel(nn.Module):
    """The head's weight is the embedding's, and the embedding comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(ids))))


class TiedByReading(nn.Module):
    """The parent multiplies with a child's weight and never calls the child."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(F.linear(x, self.inner.weight, self.inner.bias))
        return F.linear(hidden, self.inner.weight.t())


class UsedTwice(nn.Module):
    """One layer applied twice, and known under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.alias = self.layer

    def forward(self, x: Tensor) -> Tensor:
        return self.alias(torch.tanh(self.layer(x)))


class Unrolled(nn.Module):
    """A recurrence written out by hand, over a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, 4)
        self.read = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 4)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.read(state)


class ReturnsDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(4, 3)})

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = torch.relu(self.body(x))
        return {name: head(hidden) for name, head in self.heads.items()} | {"nested": [hidden]}


@dataclass
class Outputs:
    logits: Tensor
    hidden: Tensor


class ReturnsDataclass(ReturnsDict):
    def forward(self, x: Tensor) -> Any:
        found = super().forward(x)
        return Outputs(logits=found["a"], hidden=found["b"])


class PlainObject:
    def __init__(self, logits: Tensor, hidden: Tensor) -> None:
        self.logits = logits
        self.hidden = hidden


class ReturnsObject(ReturnsDict):
    def forward(self, x: Tensor) -> Any:
        found = super().forward(x)
        return PlainObject(found["a"], found["b"])


class PartlyFrozen(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self[0].requires_grad_(False)


class ScaledLinear(nn.Linear):
    """A subclass with a forward and attributes of its own."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.gain = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * super().forward(x)


class WeightStandardizedConv2d(nn.Conv2d):
    """Computes with a function of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5), self.bias, padding=1)


class Region:
    """``checkpoint`` in one of its two ways, or a plain call for None."""

    def __init__(self, use_reentrant: bool | None) -> None:
        self.use_reentrant = use_reentrant

    def __call__(self, function, x):
        return function(x) if self.use_reentrant is None else checkpoint(function, x, use_reentrant=self.use_reentrant)


class Checkpointed(nn.Module):
    """Activation checkpointing inside, of a region that both holds layers and depends on an earlier one."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(2))
        self.last = nn.Linear(8, 3)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=self.use_reentrant)
        return self.last(x)


class Attention(nn.Module):
    """The parent hands the projection's weight to nn.MultiheadAttention's function, which never calls it."""

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **sizes)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.attention(query, key, value)[0]


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def swin() -> nn.Module:
    """Its attention passes weights of children to a function."""
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        patch_size=[4, 4],
        embed_dim=8,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=[2, 2],
        stochastic_depth_prob=0.0,
        num_classes=3,
    )


def sequence(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


ZOO: dict[str, Case] = {
    "root_linear": Case(lambda: nn.Linear(4, 3), rows(5, 4)),
    "mlp": Case(lambda: sequence(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=False)), rows(5, 4)),
    "float64": Case(lambda: sequence(nn.Linear(4, 6), nn.Tanh()).double(), rows(5, 4, dtype=torch.float64)),
    "bfloat16": Case(lambda: sequence(nn.Linear(4, 6), nn.Tanh()).bfloat16(), rows(5, 4, dtype=torch.bfloat16)),
    "conv1d": Case(lambda: nn.Conv1d(2, 4, 3, padding=1, padding_mode="circular", groups=2), rows(2, 2, 7)),
    "conv2d": Case(
        lambda: sequence(nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"), nn.ReLU(), nn.Conv2d(4, 2, 3)),
        rows(2, 3, 6, 6),
    ),
    "conv3d": Case(lambda: nn.Conv3d(2, 3, 2, stride=2), rows(2, 2, 4, 4, 4)),
    "transposed": Case(
        lambda: sequence(
            nn.ConvTranspose1d(2, 4, 3, stride=2, output_padding=1),
            nn.Unflatten(1, (2, 2)),
            nn.ConvTranspose2d(2, 3, 3, groups=1),
            nn.Unflatten(1, (3, 1)),
            nn.ConvTranspose3d(3, 2, (1, 2, 2)),
        ),
        rows(2, 2, 5),
    ),
    "residual_block": Case(lambda: BasicBlock(3, 4), rows(4, 3, 8, 8)),
    "weight_standardized": Case(lambda: WeightStandardizedConv2d(3, 4, 3), rows(2, 3, 5, 5)),
    "attention": Case(Attention, lambda: tuple(torch.randn(2, 5, 8) for _ in range(3))),
    "attention_kdim": Case(
        lambda: Attention(kdim=6, vdim=4), lambda: (torch.randn(2, 5, 8), torch.randn(2, 3, 6), torch.randn(2, 3, 4))
    ),
    "encoder": Case(encoder, rows(2, 5, 8)),
    "transformer": Case(
        lambda: nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True),
        lambda: (torch.randn(2, 5, 8), torch.randn(2, 4, 8)),
    ),
    "swin": Case(swin, rows(2, 3, 16, 16)),
    "lstm": Case(lambda: nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True, proj_size=2), rows(2, 5, 3), False),
    "gru": Case(lambda: nn.GRU(3, 4), rows(5, 2, 3), False),
    "unrolled": Case(Unrolled, rows(2, 4, 3)),
    "bilinear": Case(lambda: nn.Bilinear(3, 4, 2), lambda: (torch.randn(5, 3), torch.randn(5, 4))),
    "tied_language_model": Case(TiedLanguageModel, tokens(2, 5)),
    "tied_by_reading": Case(TiedByReading, rows(3, 4)),
    "used_twice": Case(UsedTwice, rows(3, 5)),
    "partly_frozen": Case(PartlyFrozen, rows(3, 4)),
    "subclass": Case(lambda: sequence(ScaledLinear(4, 5), nn.Tanh(), ScaledLinear(5, 2)), rows(3, 4)),
    "dict": Case(ReturnsDict, rows(3, 4)),
    "dataclass": Case(ReturnsDataclass, rows(3, 4)),
    "object": Case(ReturnsObject, rows(3, 4)),
    "checkpointed": Case(lambda: Checkpointed(use_reentrant=False), rows(3, 4)),
    "checkpointed_reentrant": Case(lambda: Checkpointed(use_reentrant=True), rows(3, 4), False),
}


def build(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """The model and its input, the same at every call."""
    torch.manual_seed(0)
    case = ZOO[name]
    return case.build(), case.inputs()


def loss(output: Any) -> Tensor:
    """A scalar that every part of the output influences, and each element differently."""
    terms = []
    for tensor in tensors(output):
        weights = torch.linspace(0.5, 1.5, tensor.numel(), dtype=tensor.dtype).reshape(tensor.shape)
        terms.append((weights * tensor).sum() + (tensor**2).sum())
    return torch.stack([term.float() if term.dtype != torch.float64 else term for term in terms]).sum()
