"""What is impossible or broken ends in one line that names it, and exit code 2; a bug does not."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from conftest import ROOT, change_text_config, write_file
from safetensors.torch import save_file
from transformers import CLIPModel

import data
import eval as evaluation
import model as models
import train

QUICK = ["--max-steps", "1", "--batch-size", "4", "--workers", "0", "--out", "run"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The folder where a test works."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_file(tmp_path / "FILE", "a text")
    torch.save({"weights": torch.ones(1)}, tmp_path / "other.pt")
    (tmp_path / "EMPTY").mkdir()
    return tmp_path


@pytest.mark.parametrize("flags", [
    "--beta 1.5", "--lr -0.5", "--epochs inf", "--batch-size 0", "--batch-size 100000",
    "--data nowhere", "--data gone.json", "--data sharegpt4v --root EMPTY", "--model no/where",
    "--model EMPTY", "--model FILE", "--out FILE", "--max-steps 1e3"])
def test_impossible_arguments_of_training(run_and_fail, folder, fast_scenes, flags):
    flags = flags.split()
    assert flags[-1] in run_and_fail(train.main, *QUICK, "--model", "scratch", *flags)
    assert not (folder / "run").exists() and (folder / "FILE").read_text() == "a text"


@pytest.mark.parametrize("flags", [
    "--bench urban", "--bench gone.jsonl", "--bench urban1k --root FILE", "--json gone/s.json",
    "--bench fgovd --root EMPTY", "--ckpt nowhere", "--ckpt EMPTY", "--ckpt other.pt"])
def test_impossible_arguments_of_evaluation(run_and_fail, clip_folder, folder, fast_scenes, flags):
    flags = flags.split()
    assert flags[-1] in run_and_fail(evaluation.main, "--ckpt", clip_folder, *flags)
    assert not (folder / "gone").exists() and not list((folder / "EMPTY").iterdir())


@pytest.mark.parametrize("damage", [
    "cut weights", "half a model", "other pooler", "short context", "no tokenizer", "more tokens"])
def test_broken_models(run_and_fail, clip_folder, folder, damage):
    clip = shutil.copytree(clip_folder, folder / "clip")
    if damage == "cut weights":
        os.truncate(clip / "model.safetensors", 5000)
    elif damage == "half a model":
        half = CLIPModel.from_pretrained(clip).text_model.state_dict()
        save_file(half, clip / "model.safetensors")
    elif damage == "other pooler":
        save_file(models.PatchPooler(64).state_dict(), clip / "pooler.safetensors")
    elif damage == "short context":
        change_text_config(clip, max_position_embeddings=64)
    elif damage == "no tokenizer":
        for path in (*clip.glob("*token*"), clip / "vocab.json", clip / "merges.txt"):
            path.unlink()
    else:
        change_text_config(clip, vocab_size=300)
    error = run_and_fail(train.main, *QUICK, "--model", clip)
    assert str(clip) in error and (damage != "short context" or "64 text positions" in error)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_pickle_in_a_checkpoint_is_not_executed(run_and_fail):
    torch.save({"state_dict": Payload()}, "authors.pt")
    assert "authors.pt is not" in run_and_fail(evaluation.main, "--ckpt", "authors.pt")
    assert not Path("executed").exists()


def test_real_processes_write_one_line():
    for program, flags in (("train.py", ["--beta", "nan"]), ("eval.py", [])):
        command = [sys.executable, ROOT / program, *flags]
        process = subprocess.run(command, capture_output=True, text=True)
        assert process.returncode == 2 and process.stdout == ""
        assert process.stderr.startswith(f"{program}: ")
        assert process.stderr.count("\n") == 1, process.stderr
    assert "there is no finished run under runs/" in process.stderr


@pytest.mark.parametrize("owner, name", [
    (models, "PatchPooler"), (data, "describe_scene"), (evaluation, "recall")])
def test_a_bug_shows_its_traceback(clip_folder, monkeypatch, fast_scenes, owner, name):
    def fail(*args):
        raise TypeError("a bug of ours")  # libraries, too, raise it

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(TypeError, match="a bug of ours"), models.command_line():
        evaluation.main(["--ckpt", str(clip_folder)])
