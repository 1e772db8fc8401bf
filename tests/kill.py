"""Kill a run at random moments, resume it each time, and compare it with one left alone.

    python tests/kill.py        # twenty kills, every second one while a checkpoint is written
"""

import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # runs are equal to the last bit on a CPU
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the scripts are not a package
import data

# each process starts afresh, but does not import torch again
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["train"])
FLAGS = ("--model scratch --batch-size 4 --phrases 2 --sentences 1 --save-every 2 "
         f"--eval-every {16 / data.NUM_SCENES['train']}")  # four steps


def score_of_weights(model, *_):
    """Stands in for an evaluation: a number that changes with each step."""
    return {"hard": model.pooler.logit_scale.item()}


def train_in_process(flags, prepare, environ):
    """What a process does: `prepare`, if it is given, then a run that logs each step."""
    import train

    os.environ |= environ
    torch.set_num_threads(1)
    multiprocessing.set_start_method("forkserver", force=True)  # as Python 3.14 does on Linux
    train.LOG_EVERY = 1
    train.evaluation.evaluate = score_of_weights
    train.data.NUM_SCENES["test"] = 5 * train.data.GROUP_SIZE
    if prepare:
        prepare()
    with (open(os.environ.get("STDERR", os.devnull), "a", buffering=1) as log,
          redirect_stdout(log), redirect_stderr(log), train.command_line()):
        train.main(flags.split())


def start(flags, prepare=None, **environ):
    """Start a run in another process, which writes to the file STDERR, if it is given."""
    process = PROCESSES.Process(target=train_in_process, args=(flags, prepare, environ))
    process.start()
    return process


def read_log(run):
    """{("step" or "eval", step): the last such line, without what depends on the machine}"""
    lines = {}
    for text in Path(run, "log.jsonl").read_text().splitlines():
        line = json.loads(text)
        line.pop("images_per_s", None)
        line.pop("peak_gib", None)
        lines["eval" if "eval" in line else "step", line["step"]] = line
    return lines


def count_lines(run):
    log = Path(run, "log.jsonl")
    return log.read_text().count("\n") if log.exists() else 0


def wait_for(process, condition):
    while not condition():
        assert process.is_alive(), "it ended too early"
        time.sleep(0.001)


def kill_once(flags, run, rng, while_saving):
    """Kill a run after some steps: at any moment, or while it writes a checkpoint."""
    unfinished = run / "checkpoint.tmp"  # the kill before may have left it
    process = start(f"{flags} {run}")
    lines = count_lines(run) + rng.randint(1, 8)
    wait_for(process, lambda: count_lines(run) >= lines and not unfinished.exists())
    wait_for(process, unfinished.exists if while_saving else lambda: rng.random() < 0.05)
    process.kill()
    process.join()


def kill_and_compare(folder, kills, seed=0):
    """A run that is killed again and again must end as one that is left alone."""
    runs = [Path(folder, "killed"), Path(folder, "left-alone")]
    flags = f"{FLAGS} --max-steps {12 * kills} --out"
    rng = random.Random(seed)
    for kill in range(kills):
        kill_once(flags, runs[0], rng, while_saving=kill % 2 == 1)
    for run in runs:
        process = start(f"{flags} {run}")
        process.join()
        assert process.exitcode == 0
    assert read_log(runs[0]) == read_log(runs[1])
    weights = [torch.load(run / "checkpoint.pt", weights_only=True)["model"] for run in runs]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        kill_and_compare(temporary, kills=20, seed=time.time_ns())
    print("log and weights are those of a run left alone")
