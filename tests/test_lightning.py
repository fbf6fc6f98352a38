"""A converted model trains under Lightning, with the loss of this library and the parameter groups of its own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bnnify
from bnnify.modules.parameters import unique_bayesian_parameters

lightning = pytest.importorskip("lightning")


class Classifier(lightning.LightningModule):
    """As in docs/recipes.md."""

    def __init__(self, bnn, num_data):
        super().__init__()
        self.bnn = bnn
        self.num_data = num_data
        self.losses, self.validated, self.tested = [], [], []

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits, kl = self.bnn(x)
        loss = bnnify.elbo(F.cross_entropy(logits, y), kl, num_data=self.num_data)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        self.validated.append(self.bnn.predict(batch[0], num_samples=4, likelihood="logits"))

    def test_step(self, batch, batch_idx):
        self.tested.append(self.bnn(batch[0])[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.bnn.parameter_groups(lr=1e-3, rho_lr=1e-2))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def loader():
    labels = torch.arange(48) % 3
    inputs = F.one_hot(labels, 3)[:, :2].float() + 0.1 * torch.randn(48, 2, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(inputs, labels), batch_size=12)


@pytest.fixture
def trainer(tmp_path):
    """A Trainer on the CPU that writes nothing."""

    def make(**options):
        return lightning.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            **{"max_epochs": 2, **options},
        )

    yield make
    assert not list(tmp_path.iterdir())


def test_training_moves_means_and_rhos_and_leaves_the_prior_where_it_was(trainer):
    bnn = bnnify.convert(network())
    before = copy.deepcopy(bnn.state_dict())
    module = Classifier(bnn, num_data=48)
    trainer().fit(module, loader(), loader())
    assert len(module.losses) == 8
    for name, parameter in bnn.named_parameters():
        assert torch.equal(parameter, before[name]) == name.endswith("_prior_mean"), name
    found = module.validated[-1]
    assert found.mean.shape == (12, 3)
    assert (found.std > 0).all()


def test_it_is_the_training_that_one_writes_by_hand(trainer):
    by_hand, with_lightning = bnnify.convert(network()), bnnify.convert(network())
    module = Classifier(by_hand, num_data=48)
    optimizer = module.configure_optimizers()
    torch.manual_seed(1)
    by_hand.train()
    for batch in loader():
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        optimizer.step()
    torch.manual_seed(1)
    trainer(max_epochs=1).fit(Classifier(with_lightning, num_data=48), loader())
    torch.testing.assert_close([*with_lightning.parameters()], [*by_hand.parameters()])


def test_the_loops_of_lightning_sample_under_inference_mode_too(trainer):
    module = Classifier(bnnify.convert(network()), num_data=48)
    runner = trainer(inference_mode=True)
    runner.test(module, loader(), verbose=False)
    first = module.tested.copy()
    runner.test(module, loader(), verbose=False)
    assert not any(torch.equal(a, b) for a, b in zip(first, module.tested[len(first) :], strict=True))


def test_several_batches_may_be_accumulated_in_mixed_precision(trainer):
    module = Classifier(bnnify.convert(network()), num_data=48)
    before = copy.deepcopy(module.state_dict())
    trainer(precision="bf16-mixed", accumulate_grad_batches=2).fit(module, loader())
    assert all(torch.isfinite(torch.tensor(module.losses)))
    for parameter in unique_bayesian_parameters(module):
        assert parameter.rho.dtype == torch.float32
        assert not torch.equal(parameter.rho, before[parameter.name + "_rho"])
