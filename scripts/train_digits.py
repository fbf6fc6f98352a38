"""Makes bnnify/data/digits.pt: the digits of the demo, and a network trained on some of them.

The network is trained far past its best on few images, and so is surer of itself than it should be: as networks are.
The 300 images between those that it was trained on and those for testing are what the demo's recipe was chosen on.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from bnnify.cli.demo import make_network

SEEN, TEST, EPOCHS = 200, 500, 300
TARGET = Path(__file__).parents[1] / "bnnify" / "data" / "digits.pt"


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    order = torch.randperm(len(digits.target))
    images = torch.tensor(digits.data, dtype=torch.uint8)[order]
    labels = torch.tensor(digits.target, dtype=torch.uint8)[order]
    network = make_network()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    inputs, targets = images[:SEEN].view(-1, 1, 8, 8).float() / 16, labels[:SEEN].long()
    for _ in range(EPOCHS):
        for batch in torch.randperm(SEEN).split(50):
            optimizer.zero_grad()
            F.cross_entropy(network(inputs[batch]), targets[batch]).backward()
            optimizer.step()
    torch.save(
        {"network": network.state_dict(), "images": images, "labels": labels, "seen": SEEN, "test": TEST}, TARGET
    )
    with torch.no_grad():
        logits = network(images[TEST:].view(-1, 1, 8, 8).float() / 16)
    unseen = labels[TEST:].long()
    accuracy, nll = (logits.argmax(1) == unseen).double().mean(), F.cross_entropy(logits, unseen)
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes; on unseen digits {accuracy:.1%}, NLL {nll:.3f}")


if __name__ == "__main__":
    main()
