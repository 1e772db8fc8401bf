"""Helpers and fixtures that several test modules share."""

import json
import os
import random
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # the scripts are not a package
os.environ["HF_HUB_OFFLINE"] = "1"  # tests download nothing
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tests compare bit by bit, so they run on the CPU
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

import data
import model as models

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"  # real annotation rows, where there are any

# what a program may write to stderr besides an error
NOTES = re.compile(
    r"(arguments|model|data|evaluation|run|note): |unreadable image|.*\d%\||.* examples|$")
AUTHORS_TINY = {  # the model of golden/authors_checkpoint.pt
    "projection_dim": 32,
    "vision_config": {
        "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3,
        "num_attention_heads": 4, "image_size": 64, "patch_size": 16},
    "text_config": {
        "hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 3,
        "num_attention_heads": 4, "vocab_size": 1000, "bos_token_id": 998, "eos_token_id": 999},
}

torch.set_num_threads(1)  # as in subprocesses; small models gain nothing from more


def write_file(path, content):
    """Write bytes, a string, or anything else as JSON, and make its folders. Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, (bytes, str)):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def make_image(path, size=(90, 70), seed=0):
    """Write an image of smooth random colours, which JPEG does not harm. Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = Image.frombytes("RGB", (9, 7), random.Random(seed).randbytes(189))
    noise.resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def change_text_config(folder, **changes):
    """Replace the CLIP in a folder by a new one, whose text encoder differs."""
    config = CLIPConfig.from_pretrained(folder)
    config.text_config.update(changes)
    CLIPModel(config).save_pretrained(folder)


@pytest.fixture
def run_and_fail(capfd):
    """A function (main, *arguments) that runs a program, which must exit with code 2 and write one
    line to stderr besides notes. It returns this line."""
    def run(main, *argv):
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop, models.command_line():
            main([str(argument) for argument in argv])
        lines = re.split(r"\s*[\r\n]+\s*", capfd.readouterr().err.strip())
        errors = [line for line in lines if not NOTES.match(line)]
        assert stop.value.code == 2
        assert len(errors) == 1, lines
        return errors[0]
    return run


@pytest.fixture
def golden():
    """The folder of numbers from the authors' code."""
    return Path(__file__).parent / "golden"


@pytest.fixture
def authors_tiny(monkeypatch):
    """Let `from_authors` accept the tiny model in golden/."""
    monkeypatch.setitem(models.AUTHORS_CONFIGS, 64, AUTHORS_TINY)


@pytest.fixture(scope="session")
def tokenizer():
    return data.build_scenes_tokenizer()


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory, tokenizer):
    """A folder like the hf/ of a finished run, with a pooler. Tests do not change it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    model = models.build_small_model(tokenizer, data.PICTURE_PIXELS)
    model.use_pooler = True
    models.export(model, tokenizer, folder)
    return folder


@pytest.fixture
def tiny_model(clip_folder):
    """The model in `clip_folder`, ready to be trained."""
    torch.manual_seed(0)
    model, _ = models.load(clip_folder)
    return model.train()


@pytest.fixture
def fast_scenes(monkeypatch):
    """Make the benchmark of the scenes small, for tests that do not need its scores."""
    monkeypatch.setitem(data.NUM_SCENES, "test", 5 * data.GROUP_SIZE)
