import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # the scripts are no package
os.environ["HF_HUB_OFFLINE"] = "1"                     # no test may depend on a download,
os.environ["CUDA_VISIBLE_DEVICES"] = ""                # nor bit-exact comparisons on a GPU
import torch

import data
import eval as evaluation
import model as models

torch.set_num_threads(1)  # as the processes that tests start; and small models gain nothing from more


@pytest.fixture
def golden():
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def tokenizer():
    return data.scenes_tokenizer()


@pytest.fixture
def tiny(tokenizer):
    torch.manual_seed(0)
    return models.tiny(tokenizer)


@pytest.fixture(scope="session")
def clip(tmp_path_factory, tokenizer):
    """A folder as a finished run's hf/. Nobody may write in it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    models.export(models.tiny(tokenizer), tokenizer, folder)
    return folder


@pytest.fixture
def quick(monkeypatch):
    """The benchmark of the scenes gives figures at once, where it is not what is tested."""
    monkeypatch.setattr(evaluation, "scenes", lambda *_: {"hard": 1.0})
