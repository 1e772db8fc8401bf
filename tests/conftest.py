"""What several test modules share."""

import json
import os
import random
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTES = r"note: |nothing will be|unreadable image, another|.*(fresh pooler|is trained on|\d%\||examples)|$"
sys.path.insert(0, str(ROOT))              # the scripts are no package
os.environ["HF_HUB_OFFLINE"] = "1"         # no test may depend on a download,
os.environ["CUDA_VISIBLE_DEVICES"] = ""    # nor bit-exact comparisons on a GPU
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

import data
import eval as evaluation
import model as models

torch.set_num_threads(1)  # as the processes that tests start; and small models gain nothing from more

def write(path, content):
    """A file of bytes, of text, or of anything as JSON; its folders too. Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, (bytes, str)):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path

def picture(path, size=(90, 70), seed=0):
    """A file of coloured noise, all of it smooth enough to survive JPEG. Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = Image.frombytes("RGB", (9, 7), random.Random(seed).randbytes(189))
    noise.resize(size, Image.Resampling.BICUBIC).save(path)
    return path

def new_model(clip, **text):
    """Replace the CLIP in a folder by one of another text_config."""
    config = CLIPConfig.from_pretrained(clip)
    config.text_config.update(text)
    CLIPModel(config).save_pretrained(clip)

@pytest.fixture
def refused(capfd):
    """main, its arguments -> the one line that it ends in on stderr, with exit code 2 (but for notes)."""
    def run(main, *argv):
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(part) for part in argv])
        error = capfd.readouterr().err
        lines = [line for line in re.split(r"\s*[\r\n]+\s*", error.strip()) if not re.match(NOTES, line)]
        assert stop.value.code == 2 and len(lines) == 1, error
        return lines[0]
    return run

@pytest.fixture
def golden():
    return Path(__file__).parent / "golden"

@pytest.fixture(scope="session")
def tokenizer():
    return data.scenes_tokenizer()

@pytest.fixture
def tiny(clip):
    torch.manual_seed(0)
    return models.load(clip).train()

@pytest.fixture(scope="session")
def clip(tmp_path_factory, tokenizer):
    """A folder as a finished run's hf/, with a pooler. Nobody may write in it."""
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("clip"), models.from_scratch(tokenizer)
    model.has_trained_pooler = True
    models.export(model, tokenizer, folder)
    return folder

@pytest.fixture
def quick(monkeypatch):
    """The benchmark of the scenes gives figures at once, where it is not what is tested."""
    monkeypatch.setattr(evaluation, "scenes", lambda *_: {"hard": 1.0})
