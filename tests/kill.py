"""Kill a training process at random moments, resume it each time, and compare its log with an uninterrupted run's.

    python tests/kill.py        # twenty kills; every second one waits for a checkpoint that is being written
"""

import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
PROCESSES = multiprocessing.get_context("forkserver")  # processes of their own, which need not import torch again
PROCESSES.set_forkserver_preload(["train"])
FLAGS = "--batch-size 4 --workers 1 --save-every 2 --eval-every 0.0002 --phrases 2 --sentences 1"  # evaluates each four steps


def work(flags, environ):
    """A training process: each step is logged, and the benchmark, which is not what is tested, gives a figure at once."""
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
    """The log's lines, without what hangs on time and place."""
    read = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in ("images_per_s", "peak_gib")} for line in read]


def logged(run):
    return (run / "log.jsonl").read_text().count("\n") if (run / "log.jsonl").is_file() else 0


def wait_for(process, what):
    """Until `what()` holds; the process must not end before."""
    while not what():
        assert process.is_alive(), "it ended too early"
        time.sleep(0.001)


def kill_and_compare(folder, kills, seed=0, say=lambda line: None):
    """Kill one run `kills` times, let it end, and assert that it is the uninterrupted run, in its log and to the last bit.

    Returns how many kills left a checkpoint half written.
    """
    rng, whole, cut = random.Random(seed), Path(folder) / "whole", Path(folder) / "cut"
    flags = f"{FLAGS} --max-steps {10 * kills} --out"
    process = start(f"{flags} {whole}")
    process.join()
    assert process.exitcode == 0
    torn = 0
    for kill in range(kills):
        process, until = start(f"{flags} {cut}"), 8 * kill + rng.randint(1, 8)
        wait_for(process, lambda: logged(cut) >= until)
        if kill % 2:
            wait_for(process, (cut / "checkpoint.tmp").exists)
        else:
            time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -9
        half = [path.name for path in cut.glob("*.tmp")]
        torn += bool(half)
        say(f"kill {kill + 1} after {logged(cut)} lines of the log; half written: {', '.join(half) or 'nothing'}")
    process = start(f"{flags} {cut}")
    process.join()
    assert process.exitcode == 0
    assert lines(cut) == lines(whole)
    one, other = (torch.load(run / "checkpoint.pt", weights_only=True)["model"] for run in (whole, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)
    return torn


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torn = kill_and_compare(folder, kills=20, seed=time.time_ns(), say=print)
    print(f"20 kills, {torn} while a checkpoint was written: the log is the uninterrupted run's, line by line, the weights to the last bit")
