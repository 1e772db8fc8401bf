import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # the scripts are no package
os.environ["HF_HUB_OFFLINE"] = "1"                     # no test may depend on a download,
os.environ["CUDA_VISIBLE_DEVICES"] = ""                # nor bit-exact comparisons on a GPU
import torch

import data
import model as models


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
