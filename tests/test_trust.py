"""A run can be killed, stopped, resumed and moved, and it says when something is wrong."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM

import pytest
import torch

import eval as evaluation
import kill
import train

FLAGS = kill.FLAGS + " --workers 0"

@pytest.fixture(autouse=True)
def as_in_processes_that_kill_starts(monkeypatch):
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    monkeypatch.setattr(evaluation, "scenes", lambda model, *_: {"hard": model.pooler.logit_scale.item()})

def run(out, flags):
    train.main(f"{FLAGS} --out {out} {flags}".split())

def saved(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)

def change(monkeypatch, owner, name, calls, act):
    """In these calls, counted from 1, the function `name` of `owner` gives `act` of its result."""
    count, function = iter(range(1, 1000)), getattr(owner, name)
    choose = lambda result: act(result) if next(count) in calls else result
    monkeypatch.setattr(owner, name, lambda *args: choose(function(*args)))

def run_ranks(world, flags, said):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    environ = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(world), STDERR=str(said))
    return [kill.start(flags, RANK=str(rank), **environ) for rank in range(world)]

def exit_codes(processes):
    for process in processes:
        process.join(60)
        process.kill()
    return [process.exitcode for process in processes]

def test_three_kills_leave_no_trace(tmp_path):
    kill.kill_and_compare(tmp_path, kills=3)

@pytest.mark.parametrize("owner, name, call, step", [
    (os, "fsync", 3, 2), (os, "replace", 3, 4), (evaluation, "scenes", 2, 4), (train, "clip_loss", 6, 4)])
def test_a_run_that_ends_anywhere_goes_on_as_if_it_had_not(tmp_path, monkeypatch, owner, name, call, step):
    run(tmp_path / "whole", "--max-steps 7")
    change(monkeypatch, owner, name, [call], sys.exit)
    pytest.raises(SystemExit, run, tmp_path / "cut", "--max-steps 7")
    assert saved(tmp_path / "cut")["step"] == step
    (tmp_path / "cut").rename(tmp_path / "moved")  # this, and some flags, may change
    run(tmp_path / "moved", "--max-steps 7 --workers 1 --save-every 9 --root other --grad-checkpointing")
    assert kill.lines(tmp_path / "moved") == kill.lines(tmp_path / "whole")

@pytest.mark.parametrize("world, number", [(1, SIGTERM), (1, SIGINT), (2, SIGTERM), (2, SIGKILL)])
def test_a_signal_stops_all_ranks_after_a_step_that_is_saved(tmp_path, world, number):
    flags = f"{kill.FLAGS} --max-steps 1000 --save-every 1000 --eval-every 1 --out {tmp_path}"
    *others, last = processes = run_ranks(world, flags, tmp_path / "said")
    kill.wait_for(last, lambda: kill.logged(tmp_path) >= 3)
    loaders = Path(f"/proc/{last.pid}/task/{last.pid}/children").read_text().split()
    for pid in [*map(int, loaders), last.pid]:  # a terminal and a cluster send it to all processes
        os.kill(pid, number)
    if number == SIGKILL:
        assert exit_codes(others)[0] not in (0, None)
    else:
        assert exit_codes(processes) == [128 + number] * world and loaders
        step = saved(tmp_path)["step"]
        assert max(kill.lines(tmp_path)) == ("step", step)
        assert f"{number.name}: stopped after step {step};" in (tmp_path / "said").read_text()

def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, monkeypatch):
    change(monkeypatch, train, "clip_loss", [6], sys.exit)
    pytest.raises(SystemExit, run, tmp_path, "--max-steps 9")
    assert exit_codes(run_ranks(2, f"{FLAGS} --out {tmp_path} --max-steps 9", tmp_path / "said")) == [0, 0]
    log, said = kill.lines(tmp_path), (tmp_path / "said").read_text()
    assert said.count("resumed on 2 processes, was 1: a step is now 8 images, L_clip contrasts over 8") == 1
    seen = [line["epoch"] * 80_000 for (kind, _), line in sorted(log.items()) if kind == "step"]
    assert seen == pytest.approx([4, 8, 12, 16, 24, 32, 40])
    assert log["step", 5]["lr_pooler"] == pytest.approx(train.cosine(16 / 8, 36 / 8, 1e-3, 1e-4))

def test_the_seed_makes_the_run(tmp_path):
    for name, seed in ("a", 3), ("b", 3), ("c", 4):
        run(tmp_path / name, f"--max-steps 2 --seed {seed}")
    assert kill.lines(tmp_path / "a") == kill.lines(tmp_path / "b") != kill.lines(tmp_path / "c")

@pytest.mark.parametrize("amp, skipped", [("off", [3, 4]), ("fp16", [1, 3, 4])])  # the first finds a scale
def test_bad_steps_change_nothing_and_are_counted(tmp_path, monkeypatch, amp, skipped):
    change(monkeypatch, train, "beta_cal", [3, 4], lambda loss: loss * torch.nan)
    run(tmp_path, f"--max-steps 7 --eval-every 0.00005 --amp {amp}")
    log, optimizer = kill.lines(tmp_path), saved(tmp_path)["optimizer"]
    assert [i for i in range(1, 8) if log["eval", i]["eval"] == log["eval", i - 1]["eval"]] == skipped
    assert [i for i in range(1, 8) if log["step", i]["grad_norm"] is None] == skipped  # JSON has no NaN
    assert log["step", 7]["skipped"] == len(skipped)
    assert all(state["step"] == 7 - len(skipped) for state in optimizer["state"].values())

def test_three_bad_steps_in_a_row_end_the_run(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(train, "LOG_EVERY", 10)
    change(monkeypatch, train, "beta_cal", [4, 5, 6], lambda loss: loss * torch.nan)
    error = refused(train.main, *FLAGS.split(), "--max-steps", 20, "--save-every", 1, "--out", tmp_path)
    assert "step 6: the gradient is not finite, 3 steps in a row (L_clip 1." in error
    assert "β-CAL nan)" in error and saved(tmp_path)["step"] == 5
    assert all(x.isfinite().all() for x in saved(tmp_path)["model"].values())

def test_max_norm_limits_the_gradient(tmp_path):
    run(tmp_path, "--max-steps 1 --max-norm 0.001")
    moments = [state["exp_avg"] for state in saved(tmp_path)["optimizer"]["state"].values()]
    assert torch.nn.utils.get_total_norm(moments) == pytest.approx(0.1 * 0.001, rel=1e-3)  # β1 is 0.9
    assert kill.lines(tmp_path)["step", 1]["grad_norm"] > 0.01  # what it was

def test_a_full_disk_leaves_what_was_saved_before(tmp_path, refused):
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", tmp_path]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    try:  # the first checkpoint fits, one with Adam's moments does not
        error = refused(train.main, *FLAGS.split(), "--out", tmp_path)
        assert f"{tmp_path}/checkpoint.pt cannot be written" in error
        assert saved(tmp_path)["step"] == 0 and not list(tmp_path.glob("*.tmp"))
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)

@pytest.mark.parametrize("change, length, complaint", [
    (dict, 0, "no checkpoint"), (dict, -1000, "no checkpoint"), (list, None, "no checkpoint"),
    (lambda saved: {"weights": torch.ones(1)}, None, "no checkpoint"),
    (lambda saved: saved | {"model": {}}, None, ""),
    (lambda saved: saved | {"step": sys.exit}, None, "no checkpoint"),  # a pickle
    (lambda saved: saved | {"args": saved["args"] | {"beta": 0.2, "seed": 1}}, None,
     "another run, with beta 0.2 (now 0.5), seed 1 (now 0): choose another")])
def test_a_folder_of_something_else_is_refused_and_kept(tmp_path, refused, change, length, complaint):
    run(tmp_path, "--max-steps 1")
    file = tmp_path / "checkpoint.pt"
    torch.save(change(saved(tmp_path)), file)
    file.write_bytes(file.read_bytes()[:length])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    error = refused(train.main, *FLAGS.split(), "--max-steps", 1, "--out", tmp_path)
    assert str(tmp_path) in error and complaint in error
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
