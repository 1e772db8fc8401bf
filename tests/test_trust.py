"""A run can be killed, stopped, resumed and moved, and it says when something is wrong."""

import errno
import itertools
import json
import os
import select
import socket
import sys
import time
from functools import partial
from pathlib import Path
from signal import SIGINT, SIGTERM

import datasets
import kill
import pytest
import torch
from conftest import NOTES, make_image, write_file

import data
import eval as evaluation
import train

FLAGS = f"{kill.FLAGS} --workers 0"
ENDLESS = f"{kill.FLAGS} --max-steps 1000 --save-every 1000 --eval-every 1"


@pytest.fixture(autouse=True)
def as_in_the_processes_of_kill(tmp_path, monkeypatch, fast_scenes):
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    monkeypatch.setattr(train, "handle_signals", lambda *_: None)  # pytest keeps its own
    monkeypatch.setattr(evaluation, "evaluate", kill.score_of_weights)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def run(out, flags):
    train.main(f"{FLAGS} --out {out} {flags}".split())


def read_checkpoint(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def change_results(monkeypatch, owner, name, calls, change):
    """Apply `change` to the results of some calls, counted from 1, of a function."""
    function = getattr(owner, name)
    count = itertools.count(1)

    def replacement(*args):
        result = function(*args)
        return change(result) if next(count) in calls else result

    monkeypatch.setattr(owner, name, replacement)


def run_and_exit(monkeypatch, out, flags, owner=train, name="clip_loss", call=6):
    """Run until a call, counted from 1, of a function, and exit."""
    change_results(monkeypatch, owner, name, [call], sys.exit)
    with pytest.raises(SystemExit):
        run(out, flags)


def start_ranks(world_size, flags, stderr):
    """Start a run on several processes, with the environment that torchrun gives them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world_size)}
    return [kill.start(flags, RANK=str(rank), STDERR=str(stderr), **environ)
            for rank in range(world_size)]


def exit_codes(processes):
    for process in processes:
        process.join(20)
        process.kill()
    return [process.exitcode for process in processes]


def loaders_of(process):
    """The ids of the processes that load a run's data."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in children.split()]


# ---- killed, stopped, resumed --------------------------------------------------------------------
def test_three_kills_leave_no_trace(tmp_path):
    kill.kill_and_compare(tmp_path, kills=3)


@pytest.mark.parametrize("owner, name, call, step", [
    (os, "fsync", 3, 2), (os, "replace", 3, 4), (evaluation, "evaluate", 2, 4),
    (train, "clip_loss", 6, 4)])
def test_a_run_that_ends_anywhere_goes_on_as_if_it_had_not(
        tmp_path, monkeypatch, owner, name, call, step):
    flags = "--max-steps 7 --freeze image"
    run(tmp_path / "uninterrupted", flags)
    run_and_exit(monkeypatch, tmp_path / "ended", flags, owner, name, call)
    assert read_checkpoint(tmp_path / "ended")["step"] == step
    (tmp_path / "ended").rename(tmp_path / "moved")  # this, and some flags, may change
    flags += " --workers 1 --save-every 9 --root other --grad-checkpointing"
    run(tmp_path / "moved", flags)
    assert kill.read_log(tmp_path / "moved") == kill.read_log(tmp_path / "uninterrupted")


@pytest.mark.parametrize("world_size, number", [(1, SIGTERM), (1, SIGINT), (2, SIGTERM)])
def test_a_signal_stops_all_ranks_after_a_step_that_is_saved(tmp_path, world_size, number):
    stderr = tmp_path / "stderr"
    processes = start_ranks(world_size, f"{ENDLESS} --out {tmp_path}", stderr)
    kill.wait_for(processes[-1], lambda: kill.count_lines(tmp_path) >= 3)
    [loader] = loaders_of(processes[-1])
    for pid in (loader, processes[-1].pid):  # a terminal and a cluster send it to all processes
        os.kill(pid, number)
    assert exit_codes(processes) == [128 + number] * world_size
    step = read_checkpoint(tmp_path)["step"]
    assert max(kill.read_log(tmp_path)) == ("step", step)
    assert f"{number.name}: stopped after step {step};" in stderr.read_text()


def test_the_other_rank_and_the_loader_of_a_killed_rank_end(tmp_path):
    other, killed = start_ranks(2, f"{ENDLESS} --out {tmp_path}", tmp_path / "stderr")
    kill.wait_for(killed, lambda: kill.count_lines(tmp_path) >= 3)
    [loader] = loaders_of(killed)
    descriptor = os.pidfd_open(loader)
    killed.kill()
    assert exit_codes([other])[0] not in (0, None)
    assert select.select([descriptor], [], [], 10)[0]  # readable when the loader has ended


@pytest.mark.parametrize("flags", ["--cal none", "--cal ce --global-negatives"])
def test_two_ranks_equal_one_process_with_the_whole_batch(tmp_path, flags):
    one = tmp_path / "one"
    two = tmp_path / "two"
    flags = f"{FLAGS} --phrases 8 --sentences 5 --max-steps 3 {flags} --out"
    ranks = start_ranks(2, f"{flags} {two} --batch-size 8", tmp_path / "stderr")
    train.main(f"{flags} {one} --batch-size 16".split())
    assert exit_codes(ranks) == [0, 0]
    for step, key in itertools.product((1, 2, 3), ("l_clip", "l_cal")):
        losses = [kill.read_log(out)["step", step][key] for out in (one, two)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5, rel=0)
    moments = [read_checkpoint(out)["optimizer"]["state"] for out in (one, two)]
    torch.testing.assert_close(*moments, atol=1e-5, rtol=0)


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, monkeypatch):
    run_and_exit(monkeypatch, tmp_path, "--max-steps 9")
    stderr = tmp_path / "stderr"
    ranks = start_ranks(2, f"{FLAGS} --out {tmp_path} --max-steps 9", stderr)
    assert exit_codes(ranks) == [0, 0]
    note = f"resuming {tmp_path} at step 4 of 7, of 8 images each, processes: 2 (before: 1)\n"
    assert stderr.read_text().count(note) == 1
    log = kill.read_log(tmp_path)
    seen = [log["step", step]["epoch"] * data.NUM_SCENES["train"] for step in range(1, 8)]
    assert seen == pytest.approx([4, 8, 12, 16, 24, 32, 40])
    lr_pooler = train.cosine(16 / 8, 36 / 8, 1e-3, 1e-4)
    assert log["step", 5]["lr_pooler"] == pytest.approx(lr_pooler)


# ---- what a run says, and what may change --------------------------------------------------------
def test_a_run_says_what_it_does_and_one_of_an_older_version_resumes(
        tmp_path, monkeypatch, capfd, run_and_fail):
    run_and_exit(monkeypatch, tmp_path, "--max-steps 6")
    notes = capfd.readouterr().err
    assert notes.startswith('arguments: {"beta": 0.5, "cal": "ce", "cal_weight": 1.0, ')
    assert ("\nmodel: scratch; pooler: new; new parameters: none\ndata: scenes\nevaluation: scenes"
            f"\nrun: {tmp_path}, 6 steps of 4 images\n") in notes
    checkpoint = read_checkpoint(tmp_path)
    code = checkpoint.pop("code") | {"loss.py": "other", "eval.py": "other"}
    for name in ("data", "skipped", "bad_steps"):
        del checkpoint[name]
    for name in ("freeze", "warmup"):
        del checkpoint["args"][name]
    checkpoint["args"] |= {"size": None, "compile": False}
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    argv = f"{FLAGS} --max-steps 6 --out {tmp_path}".split()
    assert "--freeze None (now text)" in run_and_fail(train.main, *argv, "--freeze", "text")
    train.main(argv)
    assert f"run: resuming {tmp_path} at step 4 of 6, of 4 images" in capfd.readouterr().err
    log = kill.read_log(tmp_path)
    torch.save(read_checkpoint(tmp_path) | {"code": code}, tmp_path / "checkpoint.pt")
    train.main(argv)
    notes = capfd.readouterr().err
    assert f"finished; to train again, delete {tmp_path}, or give another --out\n" in notes
    assert "run: loss.py, eval.py changed since it was saved\n" in notes
    train.main([*argv, "--out", str(tmp_path / "uninterrupted")])
    assert kill.read_log(tmp_path / "uninterrupted") == log


@pytest.fixture
def own_data(tmp_path, clip_folder):
    """A file of four rows, of which the last lacks its image; and the flags of a run on it."""
    rows = [{"image": f"images/{i}.png", "caption": f"Photo {i}. No more"} for i in range(4)]
    for row in rows[:3]:
        make_image(tmp_path / row["image"])
    write_file(tmp_path / "captions_val2017.json", {"images": [], "annotations": []})  # is left out
    file = write_file(tmp_path / "folder/train.jsonl", "\n".join(map(json.dumps, rows)))
    flags = f"--model {clip_folder} --batch-size 2 --accum 1 --max-steps 1 --workers 0 --phrases 0"
    return file, f"--data {file} --out {tmp_path / 'run'} --root {tmp_path} {flags}".split()


@pytest.mark.parametrize("name, number", [("images/gone", 2), ("images/2", 3)])
def test_a_run_goes_on_with_the_same_rows_only(
        tmp_path, own_data, run_and_fail, capfd, name, number):
    file, argv = own_data
    train.main(argv)
    assert f"data: {file}: 3 rows; left out: " in capfd.readouterr().err
    (tmp_path / "images").rename(tmp_path / "folder/images")
    argv += ["--root", str(tmp_path / "folder")]  # which may change
    train.main(argv)
    assert "run: it is finished" in capfd.readouterr().err
    file.write_text(file.read_text().replace("images/1", name))
    error = run_and_fail(train.main, *argv)
    assert f"is from a run with other data, of 3 rows (now {number}): use another --out" in error


def test_rows_that_are_trained_on_are_not_evaluated_on(own_data, run_and_fail):
    file, argv = own_data
    file.write_text("\n".join(file.read_text().splitlines()[:3]))
    for source in (file, file.parent):
        error = run_and_fail(train.main, *argv, "--data", source, "--val", source)
        assert f"--val {source}: these are the training rows" in error
    file.rename(file.with_name("test.jsonl"))  # of a folder with this split alone, it is trained on
    error = run_and_fail(train.main, *argv, "--data", file.parent, "--val", file.parent)
    assert "these are the training rows" in error
    write_file(file, file.with_name("test.jsonl").read_text())
    train.main([*argv, "--data", str(file.parent), "--val", str(file.parent)])


# ---- what goes wrong -----------------------------------------------------------------------------
def hang(timeout):
    """Have the loaders hang, as they may when /dev/shm is full."""
    train.LOADER_TIMEOUT = timeout
    data.Scenes.__getitem__ = lambda *_: time.sleep(8)


def test_a_loader_that_hangs_ends_the_run(tmp_path):
    stderr = tmp_path / "stderr"
    process = kill.start(f"{kill.FLAGS} --out {tmp_path}", partial(hang, 1), STDERR=str(stderr))
    assert exit_codes([process]) == [2]
    [error] = [line for line in stderr.read_text().splitlines() if not NOTES.match(line)]
    assert "timed out after 1 seconds" in error
    assert "/dev/shm" in error and "--workers" in error


@pytest.mark.parametrize("copies", [1, 2])  # torchrun passes a copy on
def test_a_second_signal_ends_a_run_that_hangs(tmp_path, copies):
    process = kill.start(f"{kill.FLAGS} --out {tmp_path}", partial(hang, 300))
    kill.wait_for(process, lambda: loaders_of(process))
    for _ in range(copies):  # a cluster signals all processes, and torchrun does so once more
        os.kill(process.pid, SIGTERM)
        process.join(0.1)
    process.join(2)
    assert process.is_alive()
    os.kill(process.pid, SIGTERM)
    assert exit_codes([process]) == [-SIGTERM]


@pytest.mark.parametrize("amp, bad_steps", [("off", [3, 4]), ("fp16", [2, 3, 4, 5, 6])])
def test_bad_steps_change_nothing_and_are_counted(tmp_path, monkeypatch, amp, bad_steps):
    scaler = partial(torch.amp.GradScaler, init_scale=1.0)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)  # else it has bad steps of its own
    change_results(monkeypatch, train, "beta_cal", bad_steps, lambda loss: loss * torch.nan)
    run(tmp_path, f"--max-steps 7 --eval-every 0.00005 --amp {amp}")
    log = kill.read_log(tmp_path)
    scores = [log["eval", step]["eval"] for step in range(8)]
    assert [step for step in range(1, 8) if scores[step] == scores[step - 1]] == bad_steps
    assert [step for step in range(1, 8) if log["step", step]["grad_norm"] is None] == bad_steps
    assert log["step", 7]["skipped"] == len(bad_steps)
    for state in read_checkpoint(tmp_path)["optimizer"]["state"].values():
        assert state["step"] == 7 - len(bad_steps)


@pytest.mark.parametrize("flags, first_bad, last", [
    ("--max-steps 20", 4, 6), ("--max-steps 2", 1, 2), ("--max-steps 30 --amp fp16", 1, 20)])
def test_bad_steps_without_end_end_the_run(
        tmp_path, monkeypatch, run_and_fail, flags, first_bad, last):
    monkeypatch.setattr(train, "LOG_EVERY", 10)
    bad_steps = range(first_bad, 100)
    change_results(monkeypatch, train, "beta_cal", bad_steps, lambda loss: loss * torch.nan)
    argv = f"{FLAGS} {flags} --save-every 1 --out {tmp_path}".split()
    error = run_and_fail(train.main, *argv)
    assert f"step {last}: {last - first_bad + 1} gradients were not finite (L_clip 1." in error
    assert "β-CAL nan)" in error
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint["step"] == last - 1
    assert all(weight.isfinite().all() for weight in checkpoint["model"].values())


def test_a_full_disk_leaves_what_was_saved_before(tmp_path, run_and_fail, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    run_and_exit(monkeypatch, tmp_path, "--max-steps 6")
    monkeypatch.setattr(os, "fsync", fail)
    argv = f"{FLAGS} --max-steps 6 --out {tmp_path}".split()
    assert "checkpoint.pt cannot be written, and stays as it was" in run_and_fail(train.main, *argv)
    assert read_checkpoint(tmp_path)["step"] == 4
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("change, length, complaint", [
    (dict, 0, "is not a checkpoint"), (dict, -1000, "is not a checkpoint"),
    (lambda saved: {"weights": torch.ones(1)}, None, "is not a checkpoint"),
    (lambda saved: saved | {"model": {}}, None, "does not fit the model"),
    (lambda saved: saved | {"args": saved["args"] | {"beta": 0.2, "seed": 1}}, None,
     "is from a run with --beta 0.2 (now 0.5), --seed 1 (now 0): use another --out")])
def test_a_folder_of_something_else_is_refused_and_kept(
        tmp_path, run_and_fail, change, length, complaint):
    run(tmp_path, "--max-steps 1")
    file = tmp_path / "checkpoint.pt"
    torch.save(change(read_checkpoint(tmp_path)), file)
    file.write_bytes(file.read_bytes()[:length])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    error = run_and_fail(train.main, *FLAGS.split(), "--max-steps", 1, "--out", tmp_path)
    assert f"{file} {complaint}" in error
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
