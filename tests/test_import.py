"""``import bnnify`` costs next to nothing beyond ``import torch``, and changes nothing; seen from a fresh process."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest
from packaging.version import Version

HEAVY = ("torchvision", "torchaudio", "torchmetrics", "matplotlib", "rich", "scipy", "pandas", "safetensors")
HEAVY += ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.distributed.fsdp", "torch.ao")

PROGRAM = """
import json, logging, sys, warnings, torch

def state():
    levels = [logging.getLogger(name).level for name in ("", "torch")]
    modes = [torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark]
    return [*levels, *modes, str(torch.get_default_dtype()), torch.get_num_threads(), str(warnings.filters)]

modules, before = sorted(sys.modules), [state(), torch.get_rng_state().tolist()]
import bnnify
added, unchanged = sorted(set(sys.modules) - set(modules)), [state(), torch.get_rng_state().tolist()] == before
bnnify.convert(torch.nn.Linear(2, 2))
started = [torch.cuda.is_initialized(), torch.distributed.is_available() and torch.distributed.is_initialized()]
print(json.dumps({"torch": modules, "added": added, "unchanged": unchanged, "started": started}))
"""


@pytest.fixture(scope="module")
def found():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_import_brings_no_third_party_package_that_torch_does_not(found):
    packages, known = ({name.partition(".")[0] for name in found[key]} for key in ("added", "torch"))
    assert packages - known - sys.stdlib_module_names == {"bnnify"}


def test_import_brings_no_heavy_module(found):
    assert not [name for name in found["added"] if f"{name}.".startswith(tuple(f"{heavy}." for heavy in HEAVY))]


def test_import_changes_no_global_state(found):
    assert found["unchanged"]


def test_neither_import_nor_conversion_starts_cuda_or_a_process_group(found):
    assert found["started"] == [False, False]


def test_the_version_is_that_of_the_distribution_and_can_be_compared():
    import bnnify

    assert bnnify.__version__ == version("bnnify")
    assert Version(bnnify.__version__) >= Version("0.1")


def test_every_public_name_is_there_and_documented():
    import bnnify

    for name in bnnify.__all__:
        public = getattr(bnnify, name)
        text = public.__doc__ or ""
        # What dataclass writes itself, where there is nothing else, is the signature.
        assert text.strip(), name
        assert not text.startswith(f"{name}("), name
