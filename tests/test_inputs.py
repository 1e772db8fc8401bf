"""What is impossible or broken ends in one line that names it, and exit code 2; a bug does not."""

import json
import os
import re
import shutil
import subprocess
import sys

import datasets
import pytest
import torch
from conftest import ROOT, change_text_config, make_image, write_file
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

import eval as evaluation
import model as models
import train

SV1K = "share-captioner_coco_lcs_sam_1246k_1107.json"
COCO = "captions_val2017.json"
HARD, MEDIUM, EASY, TRIVIAL = (f"{name}_llava.jsonl" for name in (
    "h_attributes", "m_attributes", "e_attributes", "shuffle_negatives"))
QUICK = ["--max-steps", "1", "--batch-size", "4", "--workers", "0", "--out", "run"]
IMAGES = [{"id": 0, "file_name": "a.jpg"}, {"id": 1, "file_name": "b.jpg"}]
CAPTIONS = [{"image_id": 0, "caption": "x"}, {"image_id": 1, "caption": "y"}]
BOX = {"img_path": "val2017/a.jpg", "bbox": [5, 5, 9, 9],
       "pos_expression": ["x"], "neg_expression": ["y"]}


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
    "--beta 1.5", "--beta nan", "--lr -0.5", "--epochs inf", "--batch-size 0",
    "--batch-size 100000", "--data nowhere", "--data gone.json", "--data sharegpt4v --root EMPTY",
    "--model nowhere", "--model no/where", "--model EMPTY", "--out FILE", "--out FILE/run",
    "--model FILE", "--max-steps 1e3", "--cal soft", "--bta 0.5"])
def test_impossible_arguments_of_training(run_and_fail, folder, fast_scenes, flags):
    flags = flags.split()
    assert flags[-1] in run_and_fail(train.main, *QUICK, "--model", "scratch", *flags)
    assert not (folder / "run").exists() and (folder / "FILE").read_text() == "a text"


@pytest.mark.parametrize("flags", [
    "--bench urban", "--bench gone.jsonl", "--bench urban1k --root FILE",
    "--bench fgovd --root EMPTY", "--ckpt nowhere", "--ckpt EMPTY", "--ckpt other.pt",
    "--json EMPTY", "--json gone/s.json", "--ckpt FILE"])
def test_impossible_arguments_of_evaluation(run_and_fail, clip_folder, folder, fast_scenes, flags):
    flags = flags.split()
    assert flags[-1] in run_and_fail(evaluation.main, "--ckpt", clip_folder, *flags)
    assert not (folder / "gone").exists() and not list((folder / "EMPTY").iterdir())


def test_no_runs_to_evaluate(run_and_fail):
    assert "no run under runs/" in run_and_fail(evaluation.main, "--bench", "scenes")


@pytest.mark.parametrize("damage", [
    "no weights", "half of the weights", "cut weights", "another size", "a short context",
    "a config that is not JSON", "no tokenizer", "more tokens", "a pooler of another width"])
def test_broken_models(run_and_fail, clip_folder, folder, damage):
    clip = shutil.copytree(clip_folder, folder / "clip")
    if damage == "no weights":
        (clip / "model.safetensors").unlink()
    elif damage == "half of the weights":
        half = CLIPModel.from_pretrained(clip).text_model.state_dict()
        save_file(half, clip / "model.safetensors")
    elif damage == "cut weights":
        os.truncate(clip / "model.safetensors", 5000)
    elif damage == "another size":
        CLIPConfig.from_pretrained(clip, projection_dim=9).save_pretrained(clip)
    elif damage == "a short context":
        change_text_config(clip, max_position_embeddings=64)
    elif damage == "a config that is not JSON":
        write_file(clip / "config.json", "{")
    elif damage == "no tokenizer":
        for path in (*clip.glob("*token*"), clip / "vocab.json", clip / "merges.txt"):
            path.unlink()
    elif damage == "more tokens":
        change_text_config(clip, vocab_size=300)
    else:
        save_file(models.PatchPooler(64).state_dict(), clip / "pooler.safetensors")
    assert str(clip) in run_and_fail(train.main, *QUICK, "--model", clip)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "authors.pt"])
def test_a_pickle_in_a_checkpoint_is_not_executed(run_and_fail, clip_folder, folder, name):
    model = shutil.copytree(clip_folder, folder / "model")
    (model / "model.safetensors").unlink()
    torch.save({"state_dict": Payload()}, model / name)
    source = model / name if name == "authors.pt" else model
    assert str(source) in run_and_fail(evaluation.main, "--ckpt", source)
    assert not (folder / "executed").exists()
    torch.load(model / name, weights_only=False)  # this would have executed it
    assert (folder / "executed").exists()


def test_the_authors_model_needs_a_tokenizer(tokenizer, golden, folder, authors_tiny):
    file = shutil.copy(golden / "authors_checkpoint.pt", folder / "ce.pth")
    with pytest.raises(models.InputError, match=f"{models.OPENAI}: the tokenizer"):
        models.load(file)
    tokenizer.save_pretrained(folder)
    assert models.load(file)[1].get_vocab() == tokenizer.get_vocab()


def write_benchmarks(folder):
    for name in "ab":
        make_image(folder / f"val2017/{name}.jpg")
        make_image(folder / f"Urban1k/image/{name}.jpg")
        write_file(folder / f"Urban1k/caption/{name}.txt", name)
    write_file(folder / COCO, {"images": IMAGES, "annotations": CAPTIONS})
    for name in (HARD, MEDIUM, EASY, TRIVIAL):
        write_file(folder / name, BOX)


@pytest.mark.parametrize("benchmark, file, content, pattern", [
    ("coco", COCO, json.dumps({"images": IMAGES, "annotations": CAPTIONS})[:-9], COCO),
    ("coco", COCO, {"images": IMAGES, "annotations": CAPTIONS[:1]}, f"{COCO}, row 2.*7/b.jpg"),
    ("coco", COCO, {"images": [{"id": 0}], "annotations": []}, f"{COCO}, row 1.*file_name"),
    ("coco", "val2017/b.jpg", None, "missing.*val2017/b.jpg"),
    ("coco", "val2017/b.jpg", b"", "val2017/b.jpg.*cannot be read"),
    ("coco", "val2017/b.jpg", "cut", "val2017/b.jpg.*cannot be read"),
    ("urban1k", "Urban1k/caption/b.txt", None, "Urban1k/caption/b.txt"),
    ("sv1k", SV1K, '[{"image": "val2017/a.jpg", "caption": "x', SV1K),
    ("sv1k", SV1K, [{"image": "../a.jpg", "caption": "x"}], r"\.\./a.jpg"),
    ("sv1k", SV1K, [{"image": "/proc/a.jpg", "caption": "x"}], "/proc/a.jpg"),
    ("a.json", "a.json", [{"image": "val2017/a.jpg", "caption": None}], "a.json, row 1.*a.jpg"),
    ("fgovd", HARD, json.dumps(BOX) + '\n{"img_path": "a.jpg"}', f"{HARD}, row 2.*pos_expression"),
    ("fgovd", MEDIUM, json.dumps(BOX) + '\n{"img_path": "a.jpg"}', "row 3 of the benchmark.*pos_"),
    ("fgovd", HARD, BOX | {"neg_expression": []}, f"{HARD}, row 1.*a wrong text"),
    ("fgovd", HARD, BOX | {"bbox": [5, 5, 20]}, f"{HARD}, row 1.*bbox"),
    ("fgovd", HARD, BOX | {"bbox": []}, f"{HARD}, row 1.*bbox"),
    ("fgovd", HARD, BOX | {"bbox": None}, f"{HARD}, row 1.*bbox"),
    ("fgovd", HARD, BOX | {"bbox": [5, 5, 20, 0]}, f"{HARD}, row 1.*bbox"),
    ("fgovd", HARD, BOX | {"bbox": [95, 5, 20, 30]}, "val2017/a.jpg.*95.*outside of"),
    ("fgovd", HARD, "", f"{HARD}.*no rows")])
def test_broken_benchmarks(run_and_fail, clip_folder, folder, benchmark, file, content, pattern):
    write_benchmarks(folder)
    if content is None:
        (folder / file).unlink()
    elif content == "cut":
        os.truncate(folder / file, 300)
    else:
        write_file(folder / file, content)
    flags = ["--bench", benchmark, "--root", ".", "--ckpt", clip_folder]
    error = run_and_fail(evaluation.main, *flags)
    assert re.search(pattern, error) and "InputError" not in error


def test_all_images_are_looked_for_first(run_and_fail, clip_folder, folder, monkeypatch):
    write_benchmarks(folder)
    names = ["val2017/a.jpg", "train2017/c.jpg", "val2017/d.jpg", "train2017/e.jpg"]
    write_file(folder / HARD, "\n".join(json.dumps(BOX | {"img_path": name}) for name in names))
    monkeypatch.delattr(models.BetaCLIP, "encode_image")  # nothing is encoded
    monkeypatch.delattr(models.BetaCLIP, "encode_text")
    flags = ["--bench", "coco", "fgovd", "--root", ".", "--ckpt", clip_folder]
    error = run_and_fail(evaluation.main, *flags)
    assert "3 of 4 images are missing (2 in train2017, 1 in val2017)" in error


def test_urban1k_is_fetched_or_asked_for(run_and_fail, folder, clip_folder, monkeypatch):
    write_benchmarks(folder)
    archive = shutil.make_archive(folder / "Urban1k", "zip", folder, "Urban1k")
    monkeypatch.setattr(evaluation, "URBAN1K_URL", "file:///nowhere/Urban1k.zip")
    flags = ["--bench", "urban1k", "--root", folder / "new", "--ckpt", clip_folder]
    error = run_and_fail(evaluation.main, *flags)
    assert f"file:///nowhere/Urban1k.zip cannot be downloaded: unpack it in {folder}/new" in error
    monkeypatch.setattr(evaluation, "download_and_extract_archive",
                        lambda url, to: shutil.unpack_archive(archive, to))
    task = evaluation.load_benchmark("urban1k", folder / "new")
    assert task.images == [f"{folder}/new/Urban1k/image/{name}.jpg" for name in "ab"]


def test_real_processes_write_one_line(clip_folder, folder):
    clip = shutil.copytree(clip_folder, folder / "clip")
    os.truncate(clip / "model.safetensors", 5000)
    for argv in (["train.py", "--beta", "nan"], ["eval.py", "--ckpt", clip]):
        process = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True)
        assert process.returncode == 2 and process.stdout == ""
        assert process.stderr.startswith(f"{argv[0]}: ")
        assert process.stderr.count("\n") == 1, process.stderr


@pytest.mark.parametrize("error", [NameError, TypeError, AttributeError])
@pytest.mark.parametrize("place", ["model", "reader", "protocol"])
def test_a_bug_shows_its_traceback(clip_folder, monkeypatch, place, error):
    def fail(*args):
        raise error("a bug of ours")

    def read(path):
        yield fail() if place == "reader" else evaluation.Row("FILE", ["x"])

    if place == "model":
        monkeypatch.setattr(models, "PatchPooler", fail)
    monkeypatch.setitem(evaluation.BENCHMARKS, "scenes", ((), read, fail))
    with pytest.raises(error, match="a bug of ours"), models.command_line():
        evaluation.main(["--root", ".", "--ckpt", str(clip_folder)])
