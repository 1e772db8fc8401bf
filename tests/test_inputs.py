"""Bad and odd input, through the scripts' main(argv): what is impossible ends in one line, what is merely odd is done right."""

import builtins
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import eval as evaluation
import model as models
import train

ROOT = Path(__file__).parent.parent
QUICK = ["--max-steps", "1", "--batch-size", "4", "--workers", "0"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run's folder. Nobody may write in it."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "evaluate", lambda *args: {})
        train.main([*QUICK, "--out", str(folder)])
    return folder


def contents(folder):
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def refused(capfd, script, *argv):
    """The one line that this ends in."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        script.main([str(part) for part in argv])
    out, error = capfd.readouterr()
    assert stop.value.code == 2, error
    lines = [line.strip() for line in re.split("[\r\n]+", error) if not re.match(r"\s*($|note: |unreadable image, another|.*\d%\|)", line)]
    assert len(lines) == 1, error  # beside notes and bars
    return lines[0]


def picture(path, size=(90, 70), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("RGB", (9, 7), random.Random(seed).randbytes(189)).resize(size).save(path)
    return path


def write(path, whole):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(whole if isinstance(whole, bytes) else (whole if isinstance(whole, str) else json.dumps(whole)).encode())
    return path


def on_captions(clip, file, root, out, *more):
    """Flags of a training on a file of captions."""
    return ["--data", file, "--root", root, "--model", clip, "--phrases", 0, "--accum", 1, *QUICK, "--out", out, *more]


# ------------------------------------------------------------------------------------- the command lines

@pytest.mark.parametrize("flags, complaint", [
    ("--beta 1.5", "--beta 1.5: must be from 0 to 1"),
    ("--beta -0.1", "--beta -0.1: must be from 0 to 1"),
    ("--beta nan", "--beta nan: must be from 0 to 1"),
    ("--beta inf", "--beta inf: must be from 0 to 1"),
    ("--beta half", "--beta: invalid float value: 'half'"),
    ("--beta=", "--beta: invalid float value: ''"),
    ("--beta", "--beta: expected one argument"),
    ("--sentences -1", "--sentences -1: must be a number, at least 0"),
    ("--sentences 1.5", "--sentences: invalid int value: '1.5'"),
    ("--phrases -1", "--phrases -1: must be a number, at least 0"),
    ("--phrases many", "--phrases: invalid int value: 'many'"),
    ("--batch-size 0", "--batch-size 0: must be a number, at least 1"),
    ("--batch-size -64", "--batch-size -64: must be"),
    ("--batch-size 4.5", "--batch-size: invalid int value: '4.5'"),
    ("--batch-size 100000", "--batch-size 100000 on 1 processes: there are only 80000 samples"),
    ("--accum 0", "--accum 0: must be"),
    ("--accum nan", "--accum: invalid int value: 'nan'"),
    ("--epochs 0", "--epochs 0.0: must be"),
    ("--epochs nan", "--epochs nan: must be"),
    ("--epochs inf", "--epochs inf: must be"),
    ("--max-steps 0", "--max-steps 0: must be"),
    ("--max-steps 1e3", "--max-steps: invalid int value: '1e3'"),
    ("--lr inf", "--lr inf: must be"),
    ("--lr nan", "--lr nan: must be"),
    ("--lr=-1e-3", "--lr -0.001: must be"),
    ("--lr-pooler nan", "--lr-pooler nan: must be"),
    ("--lr-pooler x", "--lr-pooler: invalid float value: 'x'"),
    ("--wd -1", "--wd -1.0: must be"),
    ("--wd nan", "--wd nan: must be"),
    ("--workers -1", "--workers -1: must be"),
    ("--workers two", "--workers: invalid int value: 'two'"),
    ("--seed -1", "--seed -1: must be"),
    ("--clip 0", "--clip 0.0: must be"),
    ("--clip nan", "--clip nan: must be"),
    ("--save-every 0", "--save-every 0: must be"),
    ("--save-every 2.5", "--save-every: invalid int value: '2.5'"),
    ("--eval-every 0", "--eval-every 0.0: must be"),
    ("--eval-every nan", "--eval-every nan: must be"),
    ("--seed 99999999999999999999", "--seed 99999999999999999999: must be"),
    ("--seed " + "9" * 5000, "--seed: invalid int value"),
    ("--cal soft", "--cal: invalid choice: 'soft'"),
    ("--amp fp8", "--amp: invalid choice: 'fp8'"),
    ("--bta 0.5", "unrecognized arguments: --bta 0.5"),
    ("--data nowhere", "--data nowhere: there is no file nowhere"),
    ("--data .", "--data .: there is no file ."),
    ("--data README.md --root nowhere", "--root nowhere: there is no such folder"),
    ("--data README.md --root README.md", "--root README.md: there is no such folder"),
    ("--data sharegpt4v --root nowhere", "there is no file nowhere/share-captioner_coco_lcs_sam_1246k_1107.json: get it from"),
    ("--model nowhere", "--model nowhere: neither a folder nor a hub name"),
    ("--model no/where", "--model no/where: "),
    ("--model not!/a:name", "--model not!/a:name: "),
    ("--model tests", "--model tests: "),
    ("--model tests/test_inputs.py", "--model tests/test_inputs.py: "),
])
def test_impossible_arguments_of_training(tmp_path, capfd, monkeypatch, flags, complaint):
    monkeypatch.chdir(ROOT)
    assert complaint in refused(capfd, train, "--out", tmp_path / "run", *flags.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, complaint", [
    (["--bench", "urban"], "--bench urban: neither of scenes, urban1k"),
    (["--bench"], "--bench: expected at least one argument"),
    (["--score", "eos"], "--score: invalid choice: 'eos'"),
    (["--root", "FILE"], "--root FILE: is no folder"),
    (["--bench", "urban1k", "--root", "FILE"], "--root FILE: is no folder"),
    (["--bench", "fgovd", "--root", "nowhere"], "--bench fgovd: there is no h_attributes_llava.jsonl"),
    (["--ckpt", "nowhere"], "--ckpt nowhere: neither a folder nor a hub name"),
    (["--ckpt", ""], "--ckpt : "),
    (["--ckpt", "EMPTY"], "--ckpt EMPTY: [Errno 2] No such file or directory: 'EMPTY/checkpoint.pt'"),
    (["--ckpt", "FILE"], "--ckpt FILE: FILE: no checkpoint"),
    (["--json", "nowhere/s.json"], "--json nowhere/s.json: no file can be written there"),
    (["--json", "EMPTY"], "--json EMPTY: no file can be written there"),
    (["--json", "FILE/s.json"], "--json FILE/s.json: no file can be written there"),
    (["--heatmap", "gone.png", "a dog"], "gone.png: unreadable image ([Errno 2]"),
    (["--heatmap", "FILE", "a dog"], "FILE: unreadable image (cannot identify"),
    (["--heatmap", "EMPTY", "a dog"], "EMPTY: unreadable image ([Errno 21]"),
    (["--heatmap", "good.png"], "--heatmap: needs an image and at least one query"),
    (["--heatmap", "good.png", "a dog", ""], "--heatmap: needs an image and at least one query, none of them empty"),
    (["--heatmap", "good.png", " \n"], "--heatmap: needs an image and at least one query, none of them empty"),
    (["--heatmap", "good.png", "a dog", "--out", "nowhere/heat.png"], "--out nowhere/heat.png: no file can be written there"),
    (["--heatmap", "good.png", "a dog", "--out", "EMPTY"], "--out EMPTY: no file can be written there"),
    (["--heatmap", "good.png", "a dog", "--out", "heat"], "--out heat: unknown file extension"),
    (["--heatmap", "good.png", "a dog", "--out", "/proc/heat.png"], "/proc/heat.png: "),
])
def test_impossible_arguments_of_evaluation(tmp_path, capfd, monkeypatch, clip, flags, complaint):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "FILE", "no more than a text")
    (tmp_path / "EMPTY").mkdir()
    picture(tmp_path / "good.png")
    before = contents(tmp_path)
    assert complaint in refused(capfd, evaluation, *([] if "--ckpt" in flags else ["--ckpt", clip]), *flags)
    assert contents(tmp_path) == before and not (tmp_path / "nowhere").exists()


def test_scores_that_cannot_be_kept(clip, capfd, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate", lambda *args, **more: {"hard": 9.1})
    assert "--json /proc/s.json: " in refused(capfd, evaluation, "--ckpt", clip, "--json", "/proc/s.json")


def test_no_runs_to_evaluate(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no run under runs/: train one with" in refused(capfd, evaluation, "--bench", "scenes")


def test_the_latest_run_may_have_its_previous_checkpoint_alone(tmp_path):
    for age, file in ((9, "old/checkpoint.pt"), (5, "killed/previous.pt"), (1, "other/notes.txt")):
        write(tmp_path / file, "")
        os.utime(tmp_path / file, (1e9 - age, 1e9 - age))
    assert evaluation.latest_run(tmp_path) == tmp_path / "killed"


def test_a_message_is_one_line_whatever_a_name_holds(capfd):
    assert "no where" in refused(capfd, evaluation, "--ckpt", "no\nwhere")


# ------------------------------------------------------------------------------------------ run folders

@pytest.mark.parametrize("out", ["FILE", "FILE/run", "/proc/run", "locked/run"])
def test_out_that_cannot_be_written(tmp_path, capfd, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "FILE", "precious")
    (tmp_path / "locked").mkdir(mode=0o555)
    if out.startswith("locked") and os.access("locked", os.W_OK):
        pytest.skip("root writes anywhere")
    assert f"--out {out}: " in refused(capfd, train, *QUICK, "--out", out)
    assert (tmp_path / "FILE").read_text() == "precious"


def test_a_full_disk_leaves_what_was_saved_before(tmp_path, capfd, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    try:
        error = refused(capfd, train, *QUICK, "--out", disk / "run")  # the first checkpoint fits, one with Adam's moments does not
        assert f"{disk}/run/checkpoint.pt cannot be written" in error
        assert models.read(disk / "run/checkpoint.pt")["step"] == 0 and models.load(disk / "run")
        assert not list(disk.glob("run/*.tmp"))
        write(disk / "fill", b"0" * shutil.disk_usage(disk).free)
        assert "No space left" in refused(capfd, train, *QUICK, "--out", disk / "new")
        assert models.load(disk / "run")
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)  # the log is open still


class Payload:
    def __reduce__(self):
        return exec, ("import builtins; builtins.executed = True",)


@pytest.mark.parametrize("where", ["a file", "a run, evaluated", "a run, resumed", "a Hugging Face folder", "a model to train"])
def test_a_pickle_in_a_checkpoint_is_not_executed(tmp_path, capfd, clip, where):
    if where in ("a Hugging Face folder", "a model to train"):
        shutil.copy(clip / "config.json", tmp_path)
        file = tmp_path / "pytorch_model.bin"
    else:
        file = tmp_path / "checkpoint.pt"
    torch.save({"args": {}, "step": 1, "optimizer": {}, "config": Payload(), "model": {}, "payload": Payload()}, file)
    before = contents(tmp_path)
    if where == "a model to train":
        error = refused(capfd, train, *QUICK, "--model", tmp_path, "--out", tmp_path / "new")
    elif where == "a run, resumed":
        error = refused(capfd, train, *QUICK, "--out", tmp_path)
    else:
        error = refused(capfd, evaluation, "--ckpt", file if where == "a file" else tmp_path)
    assert str(tmp_path) in error and contents(tmp_path) == before
    assert not hasattr(builtins, "executed")
    torch.load(file, weights_only=False)  # as it would have been
    assert builtins.executed
    del builtins.executed


def shorter(tensors):
    return {name: tensor[:-1] if tensor.ndim else tensor for name, tensor in tensors.items()}


CHECKPOINTS = {  # what a finished run's checkpoint becomes
    "of another size": lambda saved: saved | {"model": shorter(saved["model"])},
    "without its weights": lambda saved: {name: value for name, value in saved.items() if name != "model"},
    "without one weight": lambda saved: saved | {"model": dict(list(saved["model"].items())[1:])},
    "with weights that are none": lambda saved: saved | {"model": "weights"},
    "a list": lambda saved: [saved],
    "a tensor": lambda saved: torch.ones(2),
    "empty": lambda saved: {},
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoint_that_is_another(tmp_path, capfd, run, kind):
    shutil.copytree(run, tmp_path / "run")
    torch.save(CHECKPOINTS[kind](models.read(run / "checkpoint.pt")), tmp_path / "run/checkpoint.pt")
    before = contents(tmp_path)
    for error in (refused(capfd, evaluation, "--ckpt", tmp_path / "run"), refused(capfd, train, *QUICK, "--out", tmp_path / "run")):
        assert str(tmp_path / "run") in error
    assert contents(tmp_path) == before


def test_a_cut_checkpoint(tmp_path, capfd, run):
    shutil.copytree(run, tmp_path / "run")
    whole = (run / "checkpoint.pt").read_bytes()
    for part in (b"", whole[:1000], whole[:-1000]):
        write(tmp_path / "run/checkpoint.pt", part)
        for error in (refused(capfd, evaluation, "--ckpt", tmp_path / "run"), refused(capfd, train, *QUICK, "--out", tmp_path / "run")):
            assert f"{tmp_path}/run/checkpoint.pt: no checkpoint" in error
        assert (tmp_path / "run/checkpoint.pt").read_bytes() == part


def edit(name, change):
    def edited(folder):
        whole = json.loads((folder / name).read_text())
        change(whole)
        write(folder / name, whole)
    return edited


def weights(change):
    return lambda folder: save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


FOLDERS = {  # what is done to a Hugging Face CLIP's folder
    "weights of another size": weights(shorter),
    "half of the weights": weights(lambda tensors: {name: tensor for name, tensor in tensors.items() if "text" in name}),
    "cut weights": lambda folder: write(folder / "model.safetensors", (folder / "model.safetensors").read_bytes()[:5000]),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "a config that is no JSON": lambda folder: write(folder / "config.json", "{"),
    "a config of impossible sizes": edit("config.json", lambda config: config["vision_config"].update(num_attention_heads=5)),
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("*token*")],
    "a tokenizer of more tokens": lambda folder: edit("config.json", lambda config: config["text_config"].update(vocab_size=600))(folder) or
        weights(lambda tensors: tensors | {(name := "text_model.embeddings.token_embedding.weight"): tensors[name][:600].clone()})(folder),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_model_that_is_broken(tmp_path, capfd, clip, kind):
    shutil.copytree(clip, tmp_path / "clip")
    FOLDERS[kind](tmp_path / "clip")
    assert f"--ckpt {tmp_path}/clip: " in refused(capfd, evaluation, "--ckpt", tmp_path / "clip")
    assert f"--model {tmp_path}/clip: " in refused(capfd, train, *QUICK, "--model", tmp_path / "clip", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_of_a_short_context_is_not_trained(tmp_path, capfd, clip):
    shutil.copytree(clip, tmp_path / "clip")
    edit("config.json", lambda config: config["text_config"].update(max_position_embeddings=64))(tmp_path / "clip")
    weights(lambda tensors: tensors | {(name := "text_model.embeddings.position_embedding.weight"): tensors[name][:64].clone()})(tmp_path / "clip")
    assert "it reads 64 tokens, training needs 248" in refused(capfd, train, *QUICK, "--model", tmp_path / "clip", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------- annotation files

DEEP = "[" * 100_000
ROWS = {  # a file that neither training nor evaluation takes, and what the one line names
    "no JSON": ("image,caption\na.jpg,x\n", ["row 1", "broken JSON"]),
    "nothing": ("", ["no rows"]),
    "only white space": ("﻿ \r\n\r\n", ["no rows"]),
    "a number": ("42", ["row 1", "object"]),
    "null": ("null", ["row 1", "object"]),
    "a list of lists": ('[["a.jpg", "x"]]', ["row 1", "object"]),
    "one too deep": (DEEP, ["row 1", "too deep"]),
    "one too deep in a row": ('{"image": ' + DEEP, ["row 1", "too deep"]),
    "a number of 5,000 digits": ('{"image": ' + "7" * 5000 + "}", ["row 1"]),
    "UTF-16": ('{"image": "a.jpg"}'.encode("utf-16"), ["utf-8"]),
    "gzip": (b"\x1f\x8b\x08\x00" * 50, ["utf-8"]),
    "a number for an image": ('{"image": 7, "caption": "x", "conversations": [{"from": "gpt", "value": "x"}]}', ["row 1", "'image'", "7"]),
    "a blank image": ('{"image": " ", "caption": "x", "conversations": [{"from": "gpt", "value": "x"}]}', ["row 1", "'image'"]),
    "a path that climbs": ('{"image": "a/../../x.jpg", "caption": "x", "conversations": [{"from": "gpt", "value": "x"}]}', ["row 1", "out of the root"]),
    "an absolute path": ('{"image": "/etc/passwd", "caption": "x", "conversations": [{"from": "gpt", "value": "x"}]}', ["row 1", "out of the root"]),
    "a talk that is a text": ('{"image": "a.jpg", "conversations": "x"}', ["row 1", "'conversations'"]),
    "a talk of texts": ('{"image": "a.jpg", "conversations": ["x"]}', ["row 1, conversation 1", "object"]),
    "an answer without a value": ('{"image": "a.jpg", "conversations": [{"from": "gpt"}]}', ["row 1", "'caption'"]),
    "an answer that is no text": ('{"image": "a.jpg", "conversations": [{"from": "gpt", "value": ["x"]}]}', ["row 1", "'caption'"]),
}


@pytest.mark.parametrize("kind", ROWS)
def test_annotations_that_are_none(tmp_path, capfd, monkeypatch, clip, kind):
    whole, names = ROWS[kind]
    share = write(tmp_path / data.SHAREGPT4V, whole)
    error = refused(capfd, evaluation, "--bench", "sv1k", "--root", tmp_path, "--ckpt", clip)
    assert all(name in error for name in [str(share), *names]), error
    monkeypatch.setattr(data, "HELD_OUT", 0)  # else training passes these rows by
    error = refused(capfd, train, *on_captions(clip, share, tmp_path, tmp_path / "run"))
    assert all(name in error for name in [str(share), *names]), error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_annotations_that_are_no_file(tmp_path, capfd, clip, make):
    make(tmp_path / data.SHAREGPT4V)
    assert f"{data.SHAREGPT4V}: there is no such file" in refused(capfd, evaluation, "--bench", "sv1k", "--root", tmp_path, "--ckpt", clip)
    assert "there is no file" in refused(capfd, train, "--data", tmp_path / data.SHAREGPT4V, "--out", tmp_path / "run")


BOX = {"img_path": "a.jpg", "bbox": [5, 5, 20, 30], "pos_expression": ["x"], "neg_expression": ["y", "z"]}
LISTS = {"coco": {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "x"}]},
         "flickr30k": {"images": [{"filename": "a.jpg", "split": "test", "sentences": [{"raw": "x"}]}]},
         "fgovd": {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [BOX | {"image_id": 1}]}}
FILES = {"coco": "captions_val2017.json", "flickr30k": "flickr30k_test.json", "fgovd": "h_attributes_llava.jsonl",
         "dci": "densely_captioned_images/splits.json"}
BENCHES = {  # a benchmark's annotations, and what the one line names
    "an image that is no object": ("coco", LISTS["coco"] | {"images": ["a.jpg"]}, ["image 1", "object"]),
    "a caption that is no object": ("coco", LISTS["coco"] | {"annotations": [7]}, ["annotation 1", "object"]),
    "an id that is a list": ("coco", LISTS["coco"] | {"annotations": [{"image_id": [1], "caption": "x"}]}, ["annotation 1", "'image_id'"]),
    "an image without an id": ("coco", LISTS["coco"] | {"images": [{"file_name": "a.jpg"}]}, ["image 1", "'id'"]),
    "an image without a caption": ("coco", LISTS["coco"] | {"annotations": []}, ["image 1", "no caption"]),
    "images that are no list": ("coco", LISTS["coco"] | {"images": {"a.jpg": 1}}, ["'images'"]),
    "a NUL in a name": ("coco", LISTS["coco"] | {"images": [{"id": 1, "file_name": "a\0b.jpg"}]}, ["image 1", "there is no image"]),
    "a name of 5,000 characters": ("coco", LISTS["coco"] | {"images": [{"id": 1, "file_name": "a" * 5000}]}, ["image 1", "there is no image"]),
    "two lines in a name": ("coco", LISTS["coco"] | {"images": [{"id": 1, "file_name": "a\nb.jpg"}]}, ["image 1", "there is no image"]),
    "half a surrogate pair in a name": ("coco", LISTS["coco"] | {"images": [{"id": 1, "file_name": "a\ud800.jpg"}]}, ["image 1", "a?.jpg"]),
    "a folder for an image": ("coco", LISTS["coco"] | {"images": [{"id": 1, "file_name": "."}]}, ["image 1", "there is no image"]),
    "sentences that are texts": ("flickr30k", {"images": [{"filename": "a.jpg", "split": "test", "sentences": ["x"]}]}, ["image 1, sentence 1"]),
    "a sentence without its text": ("flickr30k", {"images": [{"filename": "a.jpg", "split": "test", "sentences": [{"tokens": ["x"]}]}]}, ["image 1, sentence 1", "'raw'"]),
    "test images that are texts": ("flickr30k", {"images": ["a.jpg"]}, ["image 1", "object"]),
    "a caption that is a number": ("flickr30k", {"image": "a.jpg", "caption": ["x", 7]}, ["row 1", "no caption"]),
    "boxes that are no objects": ("fgovd", LISTS["fgovd"] | {"annotations": ["x"]}, ["annotation 1", "object"]),
    "a box of no image": ("fgovd", LISTS["fgovd"] | {"annotations": [BOX | {"image_id": 2}]}, ["annotation 1", "img_path"]),
    "images without ids": ("fgovd", LISTS["fgovd"] | {"images": [{"file_name": "a.jpg"}]}, ["image 1", "'id'"]),
    "an expression that is a number": ("fgovd", BOX | {"pos_expression": 7}, ["row 1", "pos_expression"]),
    "expressions that are an object": ("fgovd", BOX | {"neg_expression": {"y": 1}}, ["row 1", "neg_expression"]),
    "a box with NaN": ("fgovd", BOX | {"bbox": [5, 5, float("nan"), 30]}, ["row 1", "bbox"]),
    "a box at NaN": ("fgovd", BOX | {"bbox": [float("nan"), 5, 20, 30]}, ["row 1", "bbox"]),
    "a box with infinity": ("fgovd", BOX | {"bbox": [5, 5, 20, float("inf")]}, ["row 1", "bbox"]),
    "a box of 400 digits": ("fgovd", BOX | {"bbox": [5, 5, 10 ** 400, 30]}, ["row 1", "bbox"]),
    "a negative box": ("fgovd", BOX | {"bbox": [5, 5, -20, 30]}, ["row 1", "bbox"]),
    "an empty box": ("fgovd", BOX | {"bbox": [5, 5, 20, 0]}, ["row 1", "bbox"]),
    "a box of texts": ("fgovd", BOX | {"bbox": ["5", "5", "20", "30"]}, ["row 1", "bbox"]),
    "a huge box": ("fgovd", BOX | {"bbox": [5, 5, 1e8, 30]}, ["a.jpg", "[5, 5, 100000000.0, 30]", "reaches far out"]),
    "a box outside": ("fgovd", BOX | {"bbox": [95, 5, 20, 30]}, ["a.jpg", "[95, 5, 20, 30]", "outside of the image"]),
    "a box above": ("fgovd", BOX | {"bbox": [5, -40, 20, 30]}, ["a.jpg", "[5, -40, 20, 30]", "outside of the image"]),
    "a box that vanishes": ("fgovd", BOX | {"bbox": [80, 5, 1e-9, 30]}, ["a.jpg", "[80, 5, 1e-09, 30]"]),
    "splits of numbers": ("dci", {"test": [7]}, ["row 1", "7 is no file's name"]),
    "splits that are no lists": ("dci", {"test": "a.json"}, ["row 1", "'test'"]),
    "a split that climbs": ("dci", {"test": ["../../x.json"]}, ["'../../x.json' leads out of the root"]),
    "a split's file that is not there": ("dci", {"test": ["gone.json"]}, ["annotations/gone.json: there is no such file"]),
}


@pytest.fixture(scope="module")
def encoder(clip):
    """The model and the tokenizer of `clip`, loaded once."""
    return models.load(clip), models.load_tokenizer(clip)


@pytest.fixture
def loaded(encoder, monkeypatch):
    """--ckpt is loaded already."""
    monkeypatch.setattr(models, "load", lambda *args: encoder[0])
    monkeypatch.setattr(models, "load_tokenizer", lambda *args: encoder[1])
    return encoder


def fgovd_files(root, *rows):
    """FG-OVD's four files, each of the same rows."""
    for names in evaluation.FGOVD.values():
        write(root / names[0], "\n".join(json.dumps(row) for row in rows))


@pytest.mark.parametrize("kind", BENCHES)
def test_a_benchmark_with_broken_annotations(tmp_path, capfd, loaded, kind):
    bench, whole, names = BENCHES[kind]
    picture(tmp_path / "val2017/a.jpg")
    picture(tmp_path / "flickr30k/images/a.jpg")
    fgovd_files(tmp_path, BOX)
    write(tmp_path / FILES[bench], whole)
    error = refused(capfd, evaluation, "--bench", bench, "--root", tmp_path, "--ckpt", "loaded")
    assert all(name in error for name in [str(tmp_path), *names]), error


def scores(tmp_path, *argv):
    evaluation.main([*map(str, argv), "--root", str(tmp_path), "--ckpt", "loaded", "--json", str(tmp_path / "s.json")])
    return json.loads((tmp_path / "s.json").read_text())


def test_boxes_at_and_over_the_edge_are_boxes(tmp_path, loaded):
    picture(tmp_path / "val2017/a.jpg")
    boxes = [[0, 0, 90, 70], [-3, -2, 30, 30], [80, 60, 12, 12], [4, 4, 1e-3, 1e-3], [-80, -60, 250, 190]]
    fgovd_files(tmp_path, *(BOX | {"bbox": box, "pos_expression": "a red star", "neg_expression": ["a blue star", "a dog"]} for box in boxes))
    model, tokenizer = loaded
    with torch.inference_mode():
        pixels = data.to_pixels(Image.open(tmp_path / "val2017/a.jpg"), 64, whole=True)
        parts = torch.tensor(boxes) / torch.tensor([90, 70, 90, 70])
        regions = evaluation.box_embeddings(model.encode_image(pixels[None])[1].expand(5, -1, -1), parts, torch.arange(5))
        good = (regions @ evaluation.embed_texts(model, tokenizer, ["a red star", "a blue star", "a dog"]).T).argmax(1) == 0
    assert (regions.norm(dim=1) > .99).all()
    assert scores(tmp_path, "--bench", "fgovd")["fgovd"] == dict.fromkeys(evaluation.LEVELS, pytest.approx(100 * good.double().mean().item()))


# ------------------------------------------------------------------------------------------------ images

def odd_images(folder):
    """Images that are good, if odd -> {name: what their pixels are, uint8 [h, w, 3]}, worked out without PIL's convert."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    smooth = np.asarray(Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((60, 50), Image.Resampling.BICUBIC))
    right = {}

    cmyk = np.concatenate([255 - smooth, np.zeros_like(smooth[:, :, :1])], axis=2)
    Image.fromarray(cmyk, "CMYK").save(folder / "cmyk.tif")
    right["cmyk.tif"] = smooth
    deep = smooth[:, :, 0].astype(np.uint16) * 256 + rng.integers(0, 256, (50, 60)).astype(np.uint16)
    Image.fromarray(deep).save(folder / "sixteen.png")
    Image.fromarray(deep).save(folder / "sixteen.tif")
    right["sixteen.png"] = right["sixteen.tif"] = np.repeat((deep[:, :, None] // 256).astype(np.uint8), 3, axis=2)
    palette, index = rng.integers(0, 256, (16, 3), dtype=np.uint8), rng.integers(0, 16, (50, 60), dtype=np.uint8)
    image = Image.fromarray(index, "P")
    image.putpalette(palette.tobytes())
    image.save(folder / "palette.png")
    right["palette.png"] = palette[index]
    image.save(folder / "transparent.gif", save_all=True, append_images=[image.rotate(90)], transparency=3)
    right["transparent.gif"] = palette[index]  # of an animation the first frame
    Image.fromarray(smooth).save(folder / "animated.webp", save_all=True, append_images=[Image.fromarray(255 - smooth)], lossless=True)
    right["animated.webp"] = smooth
    Image.fromarray(smooth[:, :, 0] > 127).save(folder / "bits.png")
    right["bits.png"] = np.repeat((smooth[:, :, :1] > 127) * np.uint8(255), 3, axis=2)
    Image.fromarray(smooth[:, :, :2], "LA").save(folder / "grey and alpha.png")
    right["grey and alpha.png"] = np.repeat(smooth[:, :, :1], 3, axis=2)
    Image.fromarray(smooth[:1, :1]).save(folder / "one pixel ☺.png")
    right["one pixel ☺.png"] = smooth[:1, :1]
    wide = np.repeat(smooth[:20, :50], 400, axis=1)
    Image.fromarray(wide).save(folder / "wide.png")
    Image.fromarray(wide.transpose(1, 0, 2)).save(folder / "tall.bmp", "PNG")  # named as what it is not
    right["wide.png"], right["tall.bmp"] = wide, wide.transpose(1, 0, 2)
    (folder / "link.png").symlink_to(picture(folder.parent / "elsewhere/a.png"))  # the user's own link out of the root is his to make
    right["link.png"] = np.asarray(Image.open(folder / "link.png"))
    return right


def resized(pixels, size, middle):
    """uint8 [h, w, 3] -> normalised [3, size, size]: all of it, or the middle of it once its shorter side is `size`."""
    height, width, _ = pixels.shape
    wide, high = (int(size * side / min(height, width)) if middle else size for side in (width, height))
    left, top = round((wide - size) / 2), round((high - size) / 2)
    how = Image.Resampling.BICUBIC if middle else Image.Resampling.BILINEAR  # as in evaluation, as in training
    small = np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize((wide, high), how)) / 255
    small = small[top:top + size, left:left + size]
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    return torch.tensor((small - mean) / std, dtype=torch.float32).permute(2, 0, 1)


def talk(image, caption):
    return {"image": image, "conversations": [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": caption}]}


ODD_CAPTIONS = {  # caption: what is tokenised
    "emoji 🦊👩‍👩‍👧, 雪 and ﷽": "emoji 🦊👩‍👩‍👧, 雪 and ﷽",
    "نص عربي مع ‏علامات": "نص عربي مع ‏علامات",
    "half a pair \ud83e and \udc00 another": "half a pair ? and ? another",
    "a \\ud800 that is spelt out": "a \\ud800 that is spelt out",
    "  lines\r\nand\ttabs\u2028 ": "lines and tabs",
    "a NUL \0 inside": "a NUL \0 inside",
    "<|endoftext|> a dog": "<|endoftext|> a dog",
    "".join(random.Random(0).choices("abc ", k=100_000)): None,
    "ab" * 50_000: None,
    "a b. " * 20_000: None,
    "x" * 100_000: None,
}


def odd_file(path, names, form):
    """The odd captions for the images, in one of ShareGPT4V's forms: CRLF and a BOM; a key that is there twice."""
    captions = list(ODD_CAPTIONS)
    rows = [talk(name, captions[i % len(captions)]) for i, name in enumerate(names)]
    text = "\r\n".join(json.dumps(row).replace('{"image": ', '{"image": "../shadowed", "image": ', 1) for row in rows)
    return write(path, "﻿" + (f"[\r\n{text.replace(chr(10), ',' + chr(10))}\r\n]\r\n" if form == "list" else text + "\r\n"))


def test_odd_images_and_captions_are_evaluated_right(tmp_path, loaded, capfd, monkeypatch):
    right = odd_images(tmp_path / "odd")
    names = [*right] * 2
    odd_file(tmp_path / data.SHAREGPT4V, [f"odd/{name}" for name in names], "list")
    seen, texts = [], []
    encode, tokenize = loaded[0].encode_image, data.tokenize
    monkeypatch.setattr(loaded[0], "encode_image", lambda pixels: seen.append(pixels) or encode(pixels), raising=False)
    monkeypatch.setattr(data, "tokenize", lambda tokenizer, part, limits: texts.extend(part) or tokenize(tokenizer, part, limits))
    found = scores(tmp_path, "--bench", "sv1k")["sv1k"]
    assert all(0 <= score <= 100 for score in found.values())
    pixels = torch.cat(seen)
    assert len(pixels) == len(names)
    for ours, name in zip(pixels, names):
        assert (ours - resized(right[name], 64, middle=True)).abs().max() < .05, name
    assert {text for text in ODD_CAPTIONS.values() if text} <= set(texts)
    capfd.readouterr()


@pytest.mark.parametrize("form", ["list", "lines"])
def test_odd_images_and_captions_are_trained_on_right(tmp_path, clip, capfd, monkeypatch, form):
    right = odd_images(tmp_path / "odd")
    file = odd_file(tmp_path / "a.json", [f"odd/{name}" for name in right], form)
    monkeypatch.setattr(data, "HELD_OUT", 0)
    monkeypatch.setattr(data.RandomResizedCrop, "get_params", staticmethod(lambda image, *args: (0, 0, image.height, image.width)))  # all of it
    seen = {}
    get = data.Captions.__getitem__

    def kept(self, at):
        sample = get(self, at)
        seen[self.rows[at[1]]["image"]] = sample
        return sample

    monkeypatch.setattr(data.Captions, "__getitem__", kept)
    train.main([str(flag) for flag in on_captions(clip, file, tmp_path, tmp_path / "run", "--batch-size", len(right))])
    assert set(seen) == {f"odd/{name}" for name in right}
    for name in right:
        pixels, _, _, unreadable = seen[f"odd/{name}"]
        assert not unreadable and (pixels - resized(right[name], 64, middle=False)).abs().max() < .05, name
    drawn = {texts[0] for _, texts, _, _ in seen.values()}
    assert {text for text in list(ODD_CAPTIONS.values())[:len(right)] if text} <= drawn
    line = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[1])  # after the evaluation before the first step
    assert line["unreadable"] == 0 and line["loss"] < 100
    assert "unreadable" not in capfd.readouterr().err


def broken_images(folder):
    """{name: how it comes to be} of images that cannot be read; a name may have no file."""
    whole = picture(folder / "whole.jpg").read_bytes()
    png = picture(folder / "whole.png").read_bytes()
    write(folder / "zero.jpg", b"")
    write(folder / "cut.jpg", whole[:len(whole) // 2])
    write(folder / "cut.png", png[:len(png) // 2])
    write(folder / "wrong.png", png[:60] + b"\0" * 9 + png[69:])
    write(folder / "page.jpg", "<html>404</html>")
    header = b"IHDR" + struct.pack(">2I5B", 30_000, 30_000, 8, 2, 0, 0, 0)
    write(folder / "bomb.png", png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:])
    (folder / "folder.jpg").mkdir()
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "gone link.jpg").symlink_to("gone.jpg")
    return ["zero.jpg", "cut.jpg", "cut.png", "wrong.png", "page.jpg", "bomb.png", "folder.jpg", "loop.jpg", "gone link.jpg", "gone.jpg", "a\0b.jpg",
            "half \ud800.jpg", "a" * 5000]


def test_unreadable_images_are_replaced_and_counted(tmp_path, clip, capfd, monkeypatch):
    broken = broken_images(tmp_path)
    good = [picture(tmp_path / f"{i}.jpg", seed=i).name for i in range(20)]
    rows = [{"image": name, "caption": f"caption {i}"} for i, name in enumerate([*broken, *good])]
    rows += [{"image": good[0], "caption": " \n "}, {"image": good[1], "caption": ""}]  # are left out
    write(tmp_path / "a.json", rows)
    flags = on_captions(clip, tmp_path / "a.json", tmp_path, tmp_path / "run", "--batch-size", len(broken) + len(good))
    batches, collate = [], data.collate
    monkeypatch.setattr(data, "collate", lambda samples, tokenizer: batches.append(samples) or collate(samples, tokenizer))
    error = refused(capfd, train, *flags)
    assert "images of this process were unreadable, more than 1 %" in error and "--root" in error
    unreadable = {one.split(": ")[0] for sample in batches[0] for one in sample[3]}
    assert unreadable == {f"{tmp_path}/{name}".replace("\ud800", "?") for name in broken}
    assert {text for _, (text, *_), _, _ in batches[0]} == {f"caption {len(broken) + i}" for i in range(20)}  # of good ones alone
    assert all(pixels.std() > .1 for pixels, *_ in batches[0])


@pytest.mark.parametrize("name", ["zero.jpg", "cut.jpg", "cut.png", "wrong.png", "page.jpg", "bomb.png", "folder.jpg", "loop.jpg", "gone link.jpg", "gone.jpg"])
def test_an_unreadable_image_ends_an_evaluation(tmp_path, loaded, capfd, name):
    broken_images(tmp_path)
    write(tmp_path / data.SHAREGPT4V, [talk("whole.jpg", "x"), *[talk(name, "y")] * 30])  # thirty times, and one line
    assert f"{tmp_path}/{name}" in refused(capfd, evaluation, "--bench", "sv1k", "--root", tmp_path, "--ckpt", "loaded")


@pytest.mark.parametrize("size", [(1, 1), (2000, 2), (2, 2000)])
def test_heatmaps_of_odd_images_and_queries(tmp_path, loaded, size):
    image = picture(tmp_path / "a.png", size)
    evaluation.main(["--ckpt", "loaded", "--heatmap", str(image), "🦊 雪", "نص عربي", "not \udcff UTF-8", "x" * 1000, "--out", str(tmp_path / "heat.png")])
    sheet = Image.open(tmp_path / "heat.png")
    assert sheet.width == 5 * (evaluation.TILE + 12) + 12 and sheet.height < 5 * evaluation.TILE


# ------------------------------------------------------------------------------------------- few and many

def test_only_blank_captions(tmp_path, clip, capfd):
    picture(tmp_path / "a.jpg")
    write(tmp_path / "a.json", [{"image": "a.jpg", "caption": text} for text in ("", " ", "\n\t\r\n", "\u2028")])
    assert f"{tmp_path}/a.json: every caption in it is empty" in refused(capfd, train, *on_captions(clip, tmp_path / "a.json", tmp_path, tmp_path / "run"))


def test_more_ranks_than_samples(tmp_path, capfd, clip, loaded, monkeypatch):
    picture(tmp_path / "a.jpg")
    write(tmp_path / "a.json", [{"image": "a.jpg", "caption": "x"}] * 3)
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "4")
        patch.setattr(train.dist, "init_process_group", lambda *args, **more: None)
        error = refused(capfd, train, *on_captions(clip, tmp_path / "a.json", tmp_path, tmp_path / "run", "--batch-size", 1, "--model", "tiny"))
    assert "--batch-size 1 on 4 processes: there are only 3 samples" in error
    # evaluation takes any number: the parts of seven ranks are the whole of three images
    items, parts = [picture(tmp_path / f"{i}.jpg", seed=i) for i in range(3)], []
    for world in (1, 7):
        for rank in range(world):
            monkeypatch.setattr(evaluation, "share", lambda count: range(rank, count, world))
            monkeypatch.setattr(evaluation, "joined", lambda rows: parts.append(rows.clone()) or rows)
            with torch.inference_mode():
                evaluation.retrieval(*loaded, evaluation.open_image, items, ["a dog", "a cat", "a red star"], [0, 1, 2])
    whole, shares = parts[:2], [sum(parts[2 + kind::2]) for kind in (0, 1)]
    for ours, theirs in zip(shares, whole):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_the_cache_of_captions_cannot_be_written(tmp_path, clip, capfd, monkeypatch):
    picture(tmp_path / "a.jpg")
    write(tmp_path / "a.json", [{"image": "a.jpg", "caption": "x"}] * 9)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "a.jpg/cache")
    assert f"{tmp_path}/a.jpg/cache" in refused(capfd, train, *on_captions(clip, tmp_path / "a.json", tmp_path, tmp_path / "run"))


# --------------------------------------------------------------------------------------- real processes

@pytest.mark.parametrize("kind", ["half of the weights", "a caption that is no text", "beta"])
def test_a_real_process_says_one_line(tmp_path, clip, kind):
    argv = ["train.py", "--beta", "nan", "--out", tmp_path / "run"]
    if kind == "half of the weights":
        shutil.copytree(clip, tmp_path / "clip")
        FOLDERS[kind](tmp_path / "clip")
        argv = ["eval.py", "--ckpt", tmp_path / "clip"]
    elif kind == "a caption that is no text":
        write(tmp_path / "a.json", [{"image": "a.jpg", "caption": "x"}, {"image": "a.jpg", "caption": ["x"]}])
        argv = ["train.py", *on_captions(clip, tmp_path / "a.json", tmp_path, tmp_path / "run")]
    done = subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")})
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith(argv[0] + ": "), done.stderr
    assert not (tmp_path / "run").exists()
