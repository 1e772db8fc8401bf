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
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # runs are equal to the last bit on a CPU
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
PROCESSES = multiprocessing.get_context("forkserver")  # each starts afresh, but need not import torch again
PROCESSES.set_forkserver_preload(["train"])
FLAGS = "--model scratch --batch-size 4 --phrases 2 --sentences 1 --save-every 2 --eval-every 0.0002"

def work(flags, environ):
    """A training process. Each step is logged, and the benchmark gives a figure of the weights at once."""
    import train
    multiprocessing.set_start_method("fork", force=True)  # of its loaders, so that they see it die
    os.environ |= environ
    sys.stdout = sys.stderr = open(os.environ.get("STDERR", os.devnull), "a", buffering=1)
    torch.set_num_threads(1)
    train.LOG_EVERY = 1
    train.evaluation.scenes = lambda model, *_: {"hard": model.pooler.logit_scale.item()}
    train.main(flags.split())

def start(flags, **environ):
    process = PROCESSES.Process(target=work, args=(flags, environ))
    process.start()
    return process

def lines(run):
    """{("step" or "eval", step): its last line in the log, without what depends on the machine}"""
    last = {}
    for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()):
        kept = {name: value for name, value in line.items() if name not in ("images_per_s", "peak_gib")}
        last["eval" if "eval" in line else "step", line["step"]] = kept
    return last

def logged(run):
    return (run / "log.jsonl").read_text().count("\n") if (run / "log.jsonl").is_file() else 0

def wait_for(process, what):
    """Until `what()` holds; the process must not end before."""
    while not what():
        assert process.is_alive(), "it ended too early"
        time.sleep(0.001)

def kill_and_compare(folder, kills, seed=0):
    """Kill a run again and again, then let it end: its log and weights must be those of one left alone."""
    rng, whole, cut = random.Random(seed), Path(folder, "whole"), Path(folder, "cut")
    flags, half = f"{FLAGS} --max-steps {12 * kills} --out", cut / "checkpoint.tmp"  # a kill may leave it
    for kill in range(kills):
        process, until = start(f"{flags} {cut}"), logged(cut) + rng.randint(1, 8)
        wait_for(process, lambda: logged(cut) >= until and not half.exists())
        wait_for(process, half.exists if kill % 2 else lambda: rng.random() < 0.05)
        process.kill()
        process.join()
        print(f"kill {kill + 1}: {logged(cut)} lines in the log, half a checkpoint: {half.exists()}")
    for run in whole, cut:
        process = start(f"{flags} {run}")
        process.join()
        assert process.exitcode == 0
    assert lines(cut) == lines(whole)
    one, other = (torch.load(run / "checkpoint.pt", weights_only=True)["model"] for run in (whole, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        kill_and_compare(temporary, kills=20, seed=time.time_ns())
    print("log and weights are those of a run left alone")
