"""The residual network for CIFAR-10 of He et al. (2015, section 4.2), and its published weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import normalize
from ..fetch import fetched, in_folder

# What the published checkpoint was trained with: the statistics of ImageNet, not of CIFAR-10.
CHECKPOINT_MEAN, CHECKPOINT_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CHECKPOINT = "resnet20-12fca82f.th"
CHECKPOINT_URL = (
    "https://github.com/akamaster/pytorch_resnet_cifar10/raw/d5489e8995e81e91ce6b1d69dcc98ad579b0b153"
    f"/pretrained_models/{CHECKPOINT}"
)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut without parameters (option A)."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride = stride
        self.padding = (planes - in_planes) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        """The input, subsampled, with channels of zeros on either side."""
        x = x[..., :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.padding, self.padding))


class ResNet(nn.Module):
    """Three stages of `blocks` residual blocks with 16, 32 and 64 planes."""

    def __init__(self, blocks: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((-2, -1)))


def resnet20(checkpoint: Path | None = None) -> ResNet:
    """ResNet-20 in evaluation mode, with the weights of a checkpoint where one is given."""
    model = ResNet(blocks=3)
    if checkpoint is not None:
        model.load_state_dict(_state_dict(checkpoint))
    return model.eval()


def pretrained(data: Path | None = None, checkpoint: Path | None = None) -> ResNet:
    """The network of the checkpoint, of any depth; else the published ResNet-20, in the data folder or downloaded."""
    found = checkpoint or (in_folder(data, f"checkpoints/{CHECKPOINT}") if data else _downloaded())
    state = _state_dict(found)
    model = ResNet(blocks=sum(name.startswith("layer1.") and name.endswith(".conv1.weight") for name in state))
    model.load_state_dict(state)
    return model.eval().to(memory_format=torch.channels_last)


def deepened(network: ResNet, blocks: int) -> ResNet:
    """A network of more blocks that computes what this one does (Chen et al. 2016, "Net2Net").

    The blocks that come after those of each stage add nothing until their last batch norm has learned to.
    """
    deeper = ResNet(blocks, network.linear.out_features)
    known = network.state_dict()
    deeper.load_state_dict(deeper.state_dict() | known)
    for name, module in deeper.named_modules():
        if isinstance(module, BasicBlock) and f"{name}.conv1.weight" not in known:
            nn.init.zeros_(module.bn2.weight)
    return deeper.train(network.training)


def inputs(pixels: Tensor) -> Tensor:
    """Images as the published network wants them."""
    return normalize(pixels, CHECKPOINT_MEAN, CHECKPOINT_STD).contiguous(memory_format=torch.channels_last)


def _downloaded() -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / CHECKPOINT
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        fetched(
            "The pretrained ResNet-20",
            lambda: torch.hub.download_url_to_file(CHECKPOINT_URL, str(path), hash_prefix="12fca82f"),
        )
    return path


def _stage(in_planes: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_planes, planes, stride)
    return nn.Sequential(first, *(BasicBlock(planes, planes, stride=1) for _ in range(blocks - 1)))


def _state_dict(checkpoint: Path) -> dict[str, Tensor]:
    """The weights of a file that DataParallel wrote before BatchNorm counted its batches."""
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    state = {name.removeprefix("module."): value for name, value in saved.items()}
    for name in [name for name in state if name.endswith("running_mean")]:
        state.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.tensor(0))
    return state
