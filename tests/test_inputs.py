"""What is impossible or broken ends in one line that names it, and exit code 2."""

import json
import os
import shutil
import subprocess
import sys

import datasets
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

import data
import eval as evaluation
import model as models
import train
from conftest import ROOT, new_model, picture, write

SHARE, COCO, HARD = data.SHAREGPT4V, "captions_val2017.json", evaluation.FGOVD["hard"]
POOLER = models.PatchPooler(64).state_dict()
QUICK = ["--max-steps", "1", "--batch-size", "4", "--workers", "0", "--out", "run"]
TALK = {"conversations": [{"from": "gpt", "value": "x"}]}
BOX = {"img_path": "val2017/a.jpg", "bbox": [5, 5, 9, 9], "pos_expression": ["x"], "neg_expression": ["y"]}

@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where each test works."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "FILE", "no more than a text")
    torch.save({"weights": torch.ones(1)}, write(tmp_path / "other.pt", ""))
    (tmp_path / "EMPTY").mkdir()
    picture(tmp_path / "good.png")
    return tmp_path

@pytest.mark.parametrize("flags", [
    "--beta 1.5", "--beta nan", "--lr -0.5", "--epochs inf", "--batch-size 0", "--batch-size 100000",
    "--max-steps 1e3", "--cal soft", "--bta 0.5", "--data nowhere", "--data gone.json",
    "--data sharegpt4v --root EMPTY", "--model nowhere", "--model no/where", "--model EMPTY",
    "--model FILE", "--model CLIP --size 60", "--out FILE", "--out FILE/run"])
def test_impossible_arguments_of_training(refused, clip, folder, quick, flags):
    flags = flags.replace("CLIP", str(clip)).split()
    assert flags[-1] in refused(train.main, *QUICK, "--model", "scratch", *flags)
    assert not (folder / "run").exists() and (folder / "FILE").read_text() == "no more than a text"

@pytest.mark.parametrize("flags", [
    "--bench urban", "--bench gone.jsonl", "--bench urban1k --root FILE", "--bench fgovd --root EMPTY",
    "--size 60", "--ckpt nowhere", "--ckpt EMPTY", "--ckpt FILE", "--ckpt other.pt", "--json EMPTY",
    "--json gone/s.json", "--heatmap good.png", "--heatmap gone.png gone", "--heatmap scene:x scene:x",
    "--heatmap FILE FILE", "--heatmap good.png a --out EMPTY/a", "--heatmap good.png a --out gone/a.png"])
def test_impossible_arguments_of_evaluation(refused, clip, folder, quick, flags):
    flags = flags.split()
    assert flags[-1] in refused(evaluation.main, "--ckpt", clip, *flags)
    assert not (folder / "gone").exists() and not list((folder / "EMPTY").iterdir())

def test_no_runs_to_evaluate(refused):
    assert "no run under runs/" in refused(evaluation.main, "--bench", "scenes")

BROKEN_MODELS = {  # what is done to the folder of a Hugging Face CLIP
    "no weights": lambda clip: (clip / "model.safetensors").unlink(),
    "half of the weights": lambda clip: save_file(
        CLIPModel.from_pretrained(clip).text_model.state_dict(), clip / "model.safetensors"),
    "cut weights": lambda clip: os.truncate(clip / "model.safetensors", 5000),
    "another size": lambda clip: CLIPConfig.from_pretrained(clip, projection_dim=9).save_pretrained(clip),
    "a short context": lambda clip: new_model(clip, max_position_embeddings=64),
    "a config that is no JSON": lambda clip: write(clip / "config.json", "{"),
    "no tokenizer": lambda clip: [path.unlink() for path in clip.glob("*token*")],
    "a tokenizer of more tokens": lambda clip: new_model(clip, vocab_size=300),
    "a pooler of another width": lambda clip: save_file(POOLER, clip / "pooler.safetensors")}

@pytest.mark.parametrize("kind", BROKEN_MODELS)
def test_broken_models(refused, clip, folder, quick, kind):
    BROKEN_MODELS[kind](shutil.copytree(clip, folder / "clip"))
    assert f"{folder}/clip: " in refused(train.main, *QUICK, "--model", folder / "clip")

class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)

@pytest.mark.parametrize("name", ["pytorch_model.bin", "authors.pt"])
def test_a_pickle_in_a_checkpoint_is_not_executed(refused, clip, folder, name):
    shutil.copytree(clip, folder / "model", ignore=shutil.ignore_patterns("model.safetensors"))
    file = folder / "model" / name
    torch.save({"state_dict": Payload()}, file)
    assert str(folder) in refused(evaluation.main, "--ckpt", file if name == "authors.pt" else file.parent)
    assert not (folder / "executed").exists()
    torch.load(file, weights_only=False)  # as it would have been
    assert (folder / "executed").exists()

def coco(*captions):
    return {"images": [{"id": 0, "file_name": "a.jpg"}, {"id": 1, "file_name": "b.jpg"}],
            "annotations": [{"image_id": i, "caption": text} for i, text in enumerate(captions)]}

@pytest.mark.parametrize("bench, file, content, names", [
    ("coco", COCO, json.dumps(coco("x", "y"))[:-9], [COCO]),
    ("coco", COCO, coco("x"), [f"{COCO}, row 2"]),
    ("coco", COCO, coco("x", " "), [COCO, "val2017/b.jpg"]),
    ("coco", "val2017/b.jpg", None, ["val2017/b.jpg"]),
    ("coco", "val2017/b.jpg", b"", ["val2017/b.jpg", "unreadable"]),
    ("coco", "val2017/b.jpg", "cut", ["val2017/b.jpg", "unreadable"]),
    ("urban1k", "Urban1k/caption/b.txt", None, ["Urban1k/caption/b.txt"]),
    ("sv1k", SHARE, json.dumps([TALK | {"image": "val2017/a.jpg"}])[:-9], [SHARE]),
    ("sv1k", SHARE, [TALK | {"image": "../a.jpg"}], ["../a.jpg", "leads out of"]),
    ("sv1k", SHARE, [TALK | {"image": "/proc/a.jpg"}], ["/proc/a.jpg", "leads out of"]),
    ("a.json", "a.json", [{"image": "val2017/a.jpg", "caption": None}], ["a.json", "val2017/a.jpg"]),
    ("fgovd", HARD, json.dumps(BOX) + '\n{"img_path": "val2017/a.jpg"}', [f"{HARD}, row 2", "bbox"]),
    ("fgovd", HARD, BOX | {"neg_expression": []}, [f"{HARD}, row 1", "neg_expression"]),
    ("fgovd", HARD, BOX | {"bbox": [5, 5, 20]}, [f"{HARD}, row 1"]),
    ("fgovd", HARD, BOX | {"bbox": [5, 5, 20, 0]}, [f"{HARD}, row 1", "bbox"]),
    ("fgovd", HARD, BOX | {"bbox": [95, 5, 20, 30]}, ["val2017/a.jpg", "95", "outside of the image"]),
    ("fgovd", HARD, "", [HARD, "no rows"])])
def test_broken_benchmarks_are_named(refused, clip, folder, bench, file, content, names):
    for name in "ab":
        picture(folder / f"val2017/{name}.jpg")
        picture(folder / f"Urban1k/image/{name}.jpg")
        write(folder / f"Urban1k/caption/{name}.txt", "x")
    write(folder / COCO, coco("x", "y"))
    for name in evaluation.FGOVD.values():
        write(folder / name, BOX)
    if content is None:
        (folder / file).unlink()
    else:
        write(folder / file, (folder / file).read_bytes()[:300] if content == "cut" else content)
    error = refused(evaluation.main, "--bench", bench, "--root", folder, "--ckpt", clip)
    assert all(name in error for name in names) and "InputError" not in error, error

def test_real_processes_say_one_line(clip, folder):
    BROKEN_MODELS["cut weights"](shutil.copytree(clip, folder / "clip"))
    for argv in ["train.py", "--beta", "nan"], ["eval.py", "--ckpt", folder / "clip"]:
        run = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 2 and run.stdout == "", run.stderr
        assert run.stderr.startswith(f"{argv[0]}: ") and run.stderr.count("\n") == 1, run.stderr
