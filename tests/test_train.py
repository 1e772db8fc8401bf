"""Whole runs: the loop, its schedules, its folder, two ranks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.models.clip.modeling_clip import CLIPMLP

import eval as evaluation
import model as models
import train

ROOT = Path(__file__).parent.parent
ROWS = [*evaluation.LEVELS, *(f"{way} R@{k}" for way in ("T2I", "I2T") for k in (1, 5, 10))]


def log(run, evaluations=False):
    """The log's lines of steps, or of evaluations."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if ("eval" in line) == evaluations]


def test_schedule_golden(golden):
    schedule = json.loads((golden / "schedule.json").read_text())
    for step, (backbone, pooler) in enumerate(zip(schedule["backbone"], schedule["pooler"])):
        assert train.cosine(step, 500, 1e-5, 1e-7, warmup=25, start=1e-9) == pytest.approx(backbone, rel=1e-9)
        assert train.cosine(step, 500, 1e-3, 1e-4) == pytest.approx(pooler, rel=1e-9)


def test_weight_decay_is_for_matrices_only(tiny):
    groups = train.parameter_groups(tiny, 0.01)
    assert sum(len(group["params"]) for group in groups) == len(list(tiny.parameters()))
    assert all((p.ndim >= 2) == (group["weight_decay"] > 0) for group in groups for p in group["params"])
    assert {id(p) for group in groups if group["part"] == "pooler" for p in group["params"]} == {id(p) for p in tiny.pooler.parameters()}


def test_thirty_steps_lower_the_loss_and_eval_prints_every_row(tmp_path, capsys):
    run = tmp_path / "run"
    train.main(f"--max-steps 30 --batch-size 16 --workers 0 --out {run}".split())
    lines = log(run)
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert lines[-1]["loss"] < lines[0]["loss"]
    printed = capsys.readouterr().out
    evaluation.main(f"--ckpt {run} --json {tmp_path / 'scores.json'}".split())
    assert capsys.readouterr().out == printed  # the loaded run is the run
    assert [line[:22].split(maxsplit=1) for line in printed.splitlines()[2:]] == [["scenes", row + " " * (10 - len(row))] for row in ROWS]
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert list(scores["scenes"]) == ROWS and scores == json.loads((run / "eval.json").read_text())


@pytest.mark.parametrize("flags", ["--cal none", "--cal bce --amp bf16 --accum 2", "--amp fp16", "--phrases 0", "--sentences 0", "--model wide"])
def test_other_settings_train(tmp_path, flags, quick):
    train.main(f"--max-steps 2 --batch-size 8 --workers 0 --out {tmp_path} {flags}".split())
    assert log(tmp_path)[-1]["step"] == 2
    model = models.load(tmp_path)
    assert model.dim == (256 if "wide" in flags else 128)
    assert model.pools == models.load(tmp_path / "hf").pools == ("none" not in flags)


def test_two_ranks_equal_one_process_with_the_whole_batch(tmp_path):
    # with --cal none every loss goes over all ranks, and both ways draw the same samples
    flags = "--cal none --max-steps 3 --workers 0 --seed 1 --out"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py"]
    done = subprocess.run([*torchrun, *f"{flags} {tmp_path / 'two'} --batch-size 8".split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "hard" in done.stdout
    train.main(f"{flags} {tmp_path / 'one'} --batch-size 16".split())
    assert log(tmp_path / "two")[-1]["loss"] == pytest.approx(log(tmp_path / "one")[-1]["loss"], abs=1e-5)
    two, one = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["optimizer"]["state"] for name in ("two", "one"))
    for key in one:  # Adam's first moment: what the gradients were
        torch.testing.assert_close(two[key]["exp_avg"], one[key]["exp_avg"], atol=1e-5, rtol=0)


def test_gradient_checkpointing_computes_the_layers_again_and_the_same(tmp_path, monkeypatch):
    calls, forward = [], CLIPMLP.forward
    monkeypatch.setattr(CLIPMLP, "forward", lambda self, x: calls.append(self) or forward(self, x))
    monkeypatch.setattr(evaluation, "scenes", lambda *_: {"calls": len(calls)})
    for name in ([], ["--grad-checkpointing"]):
        calls.clear()
        train.main([*"--max-steps 2 --batch-size 8 --workers 0 --out".split(), str(tmp_path / str(len(name))), *name])
    plain, again = (log(tmp_path / name, evaluations=True)[0]["eval"]["scenes"]["calls"] for name in "01")
    assert again > 1.5 * plain
    assert [line["loss"] for line in log(tmp_path / "0")] == [line["loss"] for line in log(tmp_path / "1")]


def test_out_that_holds_another_run_is_refused_and_kept(tmp_path, capsys, quick):
    train.main(f"--max-steps 2 --batch-size 8 --workers 0 --out {tmp_path}".split())
    before = (tmp_path / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(f"--max-steps 2 --batch-size 8 --workers 0 --beta 0.25 --out {tmp_path}".split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "beta 0.5 (now 0.25)" in error and error.count("\n") == 1
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_checkpoint_of_something_else_is_refused(tmp_path, capsys):
    torch.save({"weights": torch.ones(1)}, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit) as stop:
        train.main(f"--out {tmp_path}".split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "none of train.py's" in error and error.count("\n") == 1
