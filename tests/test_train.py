"""The step against the authors' training, and whole runs: settings, starting points, two ranks."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT

import data
import eval as evaluation
import model as models
import train

@pytest.fixture(autouse=True)
def each_step_is_logged(monkeypatch):
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    monkeypatch.setattr(train, "on_signals", lambda _: None)  # pytest keeps its own

def log(out):
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [line for line in lines if "eval" not in line]

def run(out, flags="", model="scratch"):
    train.main(f"--max-steps 2 --batch-size 8 --workers 0 --model {model} --out {out} {flags}".split())
    return log(out)

def changed(one, other):
    """The parts of a model whose weights differ between two."""
    weights = zip(one.state_dict().items(), other.state_dict().values(), strict=True)
    return {name.split(".")[0] for (name, a), b in weights if not torch.equal(a, b)}

def test_schedule_golden(golden):
    schedule = json.loads((golden / "schedule.json").read_text())
    for name, arguments in dict(backbone=(1e-5, 1e-7, 25, 1e-9), pooler=(1e-3, 1e-4)).items():
        ours = [train.cosine(step, 500, *arguments) for step in range(500)]
        assert ours == pytest.approx(schedule[name], rel=1e-9)

def test_parameter_groups_hold_each_parameter_once_and_decay_matrices_only(tiny):
    groups = train.parameter_groups(tiny, 0.01)
    for part, module in dict(backbone=tiny.clip, pooler=tiny.pooler).items():
        of_part = [id(p) for group in groups if group["part"] == part for p in group["params"]]
        assert sorted(of_part) == sorted(map(id, module.parameters()))
    assert all((p.ndim >= 2) == (group["weight_decay"] > 0) for group in groups for p in group["params"])

@pytest.mark.parametrize("number", [0, 1], ids=["ce", "bce"])
def test_six_steps_meet_the_authors_and_accumulation_takes_the_mean(golden, number):
    case = torch.load(golden / "trajectory.pt", weights_only=True)[number]
    model, made = models.from_authors(case["start"], case["heads"]), []
    args = train.arguments(f"--cal {case['kind']} --beta {case['beta']} --accum {case['accum']}".split())
    optimizer = torch.optim.AdamW(train.parameter_groups(model, case["wd"]), betas=(0.9, 0.98), eps=1e-8)
    scaler, owner = torch.amp.GradScaler("cpu", enabled=False), torch.arange(3).repeat_interleave(6)
    for batch in case["batches"]:
        rows = [row for image in zip(batch["text"], batch["phrases"]) for level in image for row in level]
        texts = models.pack([row[:(row != 0).sum()].tolist() for row in rows])
        made.append(data.Batch(batch["pixels"], texts, owner, None, torch.arange(0, 18, 6), []))
    losses, batches = [], iter(made)
    for lr, lr_pooler in zip(case["lrs"], case["lrs_pooler"], strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr if group["part"] == "backbone" else lr_pooler
        losses += train.train_step(model, batches, optimizer, scaler, args)[0].tolist()
    assert losses == [pytest.approx(theirs, abs=2e-5) for theirs in case["losses"]]
    still, same, norms = torch.optim.SGD(model.parameters(), lr=0), itertools.repeat(made[0]), []
    for accum in (1, 3):
        args.accum = accum
        norms.append(train.train_step(model, same, still, scaler, args)[1].item())
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)

def test_thirty_steps_lower_the_loss_and_eval_prints_the_table_of_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(data.SPLITS, "test", 80)
    lines = run(tmp_path, "--max-steps 30 --batch-size 16 --sentences 2 --phrases 2")
    assert sum(line["loss"] for line in lines[-5:]) < 0.95 * sum(line["loss"] for line in lines[:5])
    printed = capsys.readouterr().out
    evaluation.main(["--ckpt", str(tmp_path), "--json", str(tmp_path / "scores.json")])
    assert capsys.readouterr().out == printed and len(printed.splitlines()) > 10
    scores, same = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("scores", "eval"))
    assert scores == same == json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["eval"]

@pytest.mark.parametrize("flags", ["--cal none", "--cal bce --amp bf16 --accum 2", "--amp fp16 --size 32",
                                   "--phrases 0 --grad-checkpointing", "--sentences 0 --max-norm 1"])
def test_other_settings_train(tmp_path, clip, flags, quick):
    assert all(0 < line["loss"] < 20 for line in run(tmp_path, flags, clip))
    for model in (models.load(tmp_path), models.load(tmp_path / "hf")):
        assert model.has_trained_pooler == ("none" not in flags)
        assert model.image_size == (32 if "size" in flags else 64)

def test_beta_cal_without_weight_is_no_beta_cal(tmp_path, quick):
    none, zero = (run(tmp_path / flags[-1], flags) for flags in ("--cal none", "--cal-weight 0"))
    assert [line["loss"] for line in zero] == pytest.approx([line["loss"] for line in none], abs=1e-5)

def test_two_ranks_equal_one_process_with_the_whole_batch(tmp_path, quick):
    driver = """import sys, train
train.LOG_EVERY, train.evaluation.scenes = 1, lambda *_: {}
for flags in sys.argv[1:]:
    train.main(flags.split())"""
    flags = {"none": "--cal none", "ce": "--cal ce --global-negatives"}
    common = f"--model scratch --max-steps 3 --batch-size 8 --workers 0 --out {tmp_path}"
    two = [f"{common}/{name}-2 {more}" for name, more in flags.items()]
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2 --no-python".split()
    subprocess.run([sys.executable, *torchrun, sys.executable, "-c", driver, *two], cwd=ROOT, check=True)
    for name, more in flags.items():
        run(tmp_path / name, f"{more} --max-steps 3 --batch-size 16")
        runs = tmp_path / name, tmp_path / f"{name}-2"
        losses = [[(line["l_clip"], line["l_cal"]) for line in log(out)] for out in runs]
        read = lambda out: models.read(out / "checkpoint.pt", "optimizer")["optimizer"]["state"]
        moments = [read(out) for out in runs]  # Adam's
        torch.testing.assert_close(*losses, atol=1e-5, rtol=0)
        torch.testing.assert_close(*moments, atol=1e-5, rtol=0)

@pytest.mark.parametrize("source", ["run", "run/hf", "clip/authors.pt", "clip"])
def test_a_trained_pooler_goes_on_and_lr_0_trains_it_alone(tmp_path, golden, clip, source, quick,
                                                           monkeypatch, capsys):
    monkeypatch.setattr(models, "load", partial(models.load, heads=4))
    start, fresh = tmp_path / source, source == "clip"
    if source.startswith("run"):
        run(tmp_path / "run")
    else:
        shutil.copytree(clip, tmp_path / "clip", ignore=shutil.ignore_patterns("pooler*"))
        shutil.copy(golden / "authors_checkpoint.pt", tmp_path / "clip/authors.pt")  # beside a tokenizer
    before = models.load(start)
    for out, lr_pooler in ("still", 0), ("moved", 0.1):
        run(tmp_path / out, f"--lr 0 --lr-pooler {lr_pooler}", start)
        said = capsys.readouterr().err
        assert f"{start}: {'a fresh pooler' if fresh else 'its pooler is trained on'}" in said
        assert changed(before, models.load(tmp_path / out)) == ({"pooler"} if fresh or lr_pooler else set())

def test_the_scenes_start_from_a_base_that_is_trained_once(tmp_path, quick, monkeypatch):
    base, few = tmp_path / "base", "--max-steps 1 --batch-size 8 --workers 0"
    monkeypatch.setattr(train, "BASE", str(base))
    monkeypatch.setattr(train, "BASE_ARGUMENTS", [*train.BASE_ARGUMENTS, *few.split(), "--out", str(base)])
    for name in ("first", "second"):
        run(tmp_path / name, "--lr 0", "base")
        assert changed(models.load(base), models.load(tmp_path / name)) == {"pooler"}
        assert len((base / "log.jsonl").read_text().splitlines()) == 3  # a step between two evaluations
    arguments = models.read(base / "checkpoint.pt", "args")["args"]
    assert (arguments["cal"], arguments["sentences"], arguments["model"]) == ("none", 1, "scratch")

def test_the_snippets_of_the_model_card_run(tmp_path, quick, capsys):
    run(tmp_path)
    card = (tmp_path / "hf/README.md").read_text()
    assert "hard" in card and f"--out {tmp_path}" in card and "base_model" not in card
    snippets = re.findall("```python\n(.*?)```", card, re.DOTALL)
    capsys.readouterr()
    for snippet in snippets:
        exec(snippet, {})
    assert len(snippets) == 3 and capsys.readouterr().out.count("torch.Size") == 2
