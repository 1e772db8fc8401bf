"""A run can be killed, stopped, resumed, moved, and says when something is wrong (most in processes of their own)."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
from pathlib import Path

import pytest
import torch

import data
import eval as evaluation
import kill
import loss
import train

FLAGS = kill.FLAGS.replace("--workers 1", "--workers 0")


@pytest.fixture(autouse=True)
def each_step_is_logged(monkeypatch):
    monkeypatch.setattr(train, "LOG_EVERY", 1)


@pytest.fixture(autouse=True)
def no_process_stays():
    yield
    for process in multiprocessing.active_children():
        process.kill()


def saved(run, name="checkpoint.pt"):
    return torch.load(run / name, weights_only=True)


def equal(one, other):
    return all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])


def refused(capsys, flags):
    with pytest.raises(SystemExit) as stop:
        train.main(flags.split())
    assert stop.value.code == 2
    return capsys.readouterr().err


def breaks_off(monkeypatch, flags, calls):
    """A run that dies in its step number `calls`."""
    count = iter(range(1, calls + 1))

    def dies(*args):
        if next(count) == calls:
            raise KeyboardInterrupt
        return loss.clip_loss(*args)
    with monkeypatch.context() as patch:
        patch.setattr(train, "clip_loss", dies)
        with pytest.raises(KeyboardInterrupt):
            train.main(flags.split())


def start_ranks(*flags, **environ):
    """A process for each rank, each with its own flags."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [kill.start(mine, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(len(flags)), RANK=str(rank), LOCAL_RANK=str(rank), **environ)
            for rank, mine in enumerate(flags)]


def ended(processes):
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


# ---- killed, stopped, resumed

def test_three_kills_leave_no_trace(tmp_path):
    kill.kill_and_compare(tmp_path, kills=3)


def test_a_kill_between_the_two_renames(tmp_path, quick, monkeypatch):
    train.main(f"{FLAGS} --max-steps 6 --out {tmp_path / 'whole'}".split())
    breaks_off(monkeypatch, f"{FLAGS} --max-steps 6 --out {tmp_path / 'cut'}", 6)
    assert (saved(tmp_path / "cut", "previous.pt")["step"], saved(tmp_path / "cut")["step"]) == (2, 4)  # the last two are kept
    os.replace(tmp_path / "cut/checkpoint.pt", tmp_path / "cut/previous.pt")
    train.main(f"{FLAGS} --max-steps 6 --resume --out {tmp_path / 'cut'}".split())
    assert kill.lines(tmp_path / "cut") == kill.lines(tmp_path / "whole") and equal(saved(tmp_path / "cut"), saved(tmp_path / "whole"))


def test_dropout_goes_on_as_it_would_have(tmp_path, quick, monkeypatch, clip):
    shutil.copytree(clip, tmp_path / "clip")
    config = json.loads((clip / "config.json").read_text())
    config["text_config"]["attention_dropout"] = config["vision_config"]["attention_dropout"] = 0.3
    (tmp_path / "clip/config.json").write_text(json.dumps(config))
    flags = f"{FLAGS} --max-steps 6 --model {tmp_path / 'clip'} --out"
    train.main(f"{flags} {tmp_path / 'whole'}".split())
    breaks_off(monkeypatch, f"{flags} {tmp_path / 'cut'}", 6)
    train.main(f"{flags} {tmp_path / 'cut'}".split())
    assert kill.lines(tmp_path / "cut") == kill.lines(tmp_path / "whole") and equal(saved(tmp_path / "cut"), saved(tmp_path / "whole"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_step_end_and_saves_it(tmp_path, number):
    run, said = tmp_path / "run", tmp_path / "said"
    process = kill.start(f"{kill.FLAGS} --save-every 1000 --eval-every 1 --max-steps 1000 --out {run}", STDERR=str(said))
    kill.wait_for(process, lambda: kill.logged(run) >= 3)
    loaders = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in [*map(int, loaders), process.pid]:  # as a terminal and a cluster do it, to all processes
        os.kill(pid, number)
    assert ended([process]) == [128 + number] and loaders
    step = saved(run)["step"]
    assert step == kill.logged(run) == kill.lines(run)[-1]["step"]
    assert f"{number.name}: stopped after step {step}, which is saved" in said.read_text()


def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path):
    run = tmp_path / "run"
    ranks = start_ranks(*[f"{FLAGS} --save-every 1000 --eval-every 1 --max-steps 1000 --out {run}"] * 2)
    kill.wait_for(ranks[0], lambda: kill.logged(run) >= 2)
    os.kill(ranks[1].pid, signal.SIGTERM)
    assert ended(ranks) == [143, 143]
    assert saved(run)["step"] == kill.logged(run) and len(saved(run)["rng"]) == 2


def test_resume_and_no_resume(tmp_path, quick, capsys):
    assert "there is no run in --out" in refused(capsys, f"{FLAGS} --resume --out {tmp_path / 'none'}")
    train.main(f"{FLAGS} --max-steps 2 --out {tmp_path}".split())
    before = (tmp_path / "checkpoint.pt").read_bytes()
    assert "holds a run" in refused(capsys, f"{FLAGS} --max-steps 2 --no-resume --out {tmp_path}")
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_the_seed_makes_the_run(tmp_path, quick):
    for name, seed in ("a", 3), ("b", 3), ("c", 4):
        train.main(f"{FLAGS} --max-steps 2 --seed {seed} --out {tmp_path / name}".split())
    a, b, c = (tmp_path / name for name in "abc")
    assert kill.lines(a) == kill.lines(b) and equal(saved(a), saved(b)) and kill.lines(a) != kill.lines(c)


# ---- ranks

def test_a_rank_that_dies_ends_the_others(tmp_path):
    ranks = start_ranks(*[f"{FLAGS} --max-steps 1000 --out {tmp_path / 'run'}"] * 2)
    kill.wait_for(ranks[0], lambda: kill.logged(tmp_path / "run") >= 2)
    ranks[1].kill()
    alive, dead = ended(ranks)
    assert dead == -9 and alive not in (0, None)


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, quick, monkeypatch, capsys):
    run, said = tmp_path / "run", tmp_path / "said"
    breaks_off(monkeypatch, f"{FLAGS} --max-steps 9 --out {run}", 6)
    assert saved(run)["seen"] == 16
    ranks = start_ranks(*[f"{FLAGS} --max-steps 9 --out {run}"] * 2, STDERR=str(said))
    assert ended(ranks) == [0, 0]
    note, = (line for line in said.read_text().splitlines() if "resumed on" in line)
    assert "resumed on 2 processes, was 1: a step is now 8 images, L_clip contrasts over 8, 3 steps are left" in note
    steps = [line for line in kill.lines(run) if "eval" not in line]
    assert [line["step"] for line in steps] == list(range(1, 8))
    assert [line["epoch"] * 80_000 for line in steps] == pytest.approx([4, 8, 12, 16, 24, 32, 40])
    rate = train.cosine(16 / 8, 36 / 8, 1e-3, 1e-4)  # of the pooler, by images seen
    assert steps[4]["lr_pooler"] == pytest.approx(rate)


def test_ranks_that_do_not_share_the_folder_end(tmp_path, quick, monkeypatch):
    breaks_off(monkeypatch, f"{FLAGS} --max-steps 9 --out {tmp_path / 'a'}", 6)
    ranks = start_ranks(*(f"{FLAGS} --max-steps 9 --out {tmp_path / name}" for name in "ab"), STDERR=str(tmp_path / "said"))
    assert ended(ranks) == [2, 2] and "on a disk that all nodes share" in (tmp_path / "said").read_text()


# ---- numbers

def nan_in(monkeypatch, steps):
    """The run's steps, from 1, whose loss is made NaN."""
    count = iter(range(1, 1000))
    monkeypatch.setattr(train, "beta_cal", lambda *args: loss.beta_cal(*args) * (torch.nan if next(count) in steps else 1))


def test_a_single_bad_step_changes_nothing(tmp_path, quick, monkeypatch):
    nan_in(monkeypatch, {3, 4})
    train.main(f"{FLAGS} --max-steps 6 --save-every 1 --out {tmp_path}".split())
    steps = [line for line in kill.lines(tmp_path) if "eval" not in line]
    assert [line["grad_norm"] is None for line in steps] == [False, False, True, True, False, False] and steps[-1]["skipped"] == 2
    state = saved(tmp_path)
    assert all(x.isfinite().all() for x in state["model"].values()) and {one["step"].item() for one in state["optimizer"]["state"].values()} == {4}


def test_bad_steps_in_a_row_stop_the_run_and_are_named(tmp_path, quick, monkeypatch, capsys):
    nan_in(monkeypatch, {4, 5, 6})
    error = refused(capsys, f"{FLAGS} --max-steps 9 --save-every 1 --out {tmp_path}")
    batch, = data.Batches(80_000, 4, 12, 16)
    assert "step 4: the gradient is not finite, for 3 steps in a row" in error and f"its samples: {sorted(index for _, index in batch)}" in error
    assert saved(tmp_path)["step"] == 3 and all(x.isfinite().all() for x in saved(tmp_path)["model"].values())


def test_bad_steps_between_two_lines_of_the_log_stop_the_run_too(tmp_path, quick, monkeypatch, capsys):
    monkeypatch.setattr(train, "LOG_EVERY", 10)
    nan_in(monkeypatch, {4, 5, 6})
    error = refused(capsys, f"{FLAGS} --max-steps 20 --save-every 100 --eval-every 1 --out {tmp_path}")
    batch, = data.Batches(80_000, 4, 12, 16)
    assert "step 4: the gradient is not finite, for 3 steps in a row" in error and f"its samples: {sorted(index for _, index in batch)}" in error


def test_clip_limits_the_gradient(tmp_path, quick):
    train.main(f"{FLAGS} --max-steps 1 --clip 0.001 --out {tmp_path}".split())
    moments = [one["exp_avg"] for one in saved(tmp_path)["optimizer"]["state"].values()]
    assert torch.nn.utils.get_total_norm(moments) == pytest.approx(0.1 * 0.001, rel=1e-3)  # β1 = 0.9
    assert kill.lines(tmp_path)[0]["grad_norm"] > 0.01  # the log has what it was


# ---- what can be watched

def test_evaluation_during_training_and_the_best_checkpoint(tmp_path, quick, monkeypatch):
    scores = iter([{"hard": 1.0, "T2I R@10": 9.0}, {"hard": 3.0, "T2I R@10": 0.0}, {"hard": 2.0, "T2I R@10": 9.0}])
    monkeypatch.setattr(evaluation, "scenes", lambda *_: next(scores))
    train.main(f"{FLAGS} --max-steps 60 --save-every 1000 --eval-every 0.001 --out {tmp_path}".split())
    lines = kill.lines(tmp_path)
    assert [(line["step"], line["eval"]["scenes"]["hard"]) for line in lines if "eval" in line] == [(20, 1.0), (40, 3.0), (60, 2.0)]
    assert (saved(tmp_path, "best.pt")["step"], saved(tmp_path)["step"]) == (40, 60)
    assert json.loads((tmp_path / "eval.json").read_text())["scenes"]["hard"] == 2.0
    assert {"step", "epoch", "loss", "clip", "cal", "clip_scale", "pool_scale", "lr", "lr_pooler", "grad_norm", "skipped", "unreadable"} == set(lines[0])
    with (tmp_path / "log.jsonl").open() as log:
        assert {"images_per_s", "peak_gib"} < set(json.loads(next(log)))
