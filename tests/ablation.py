"""The paper's ablation at the scale of the built-in scenes, run by hand: it launches train.py and tabulates what that measured.

    python tests/ablation.py            # runs what is not done yet, under runs/ablation/, then prints the table
    python tests/ablation.py --table    # only the table of what is done

A run that was stopped goes on where its checkpoint stands; its output is in NAME.log beside its folder.
On a CPU the runs are of train.py's default size, each on one core and as many at a time as there are; only those of
THRICE get three seeds. With CUDA they are wider and longer, one after the other, and all get three.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

CUDA = torch.cuda.is_available()
ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / ("ablation-wide" if CUDA else "ablation")
COLUMNS = {"hard": "Hard", "medium": "Medium", "easy": "Easy", "trivial": "Trivial", "T2I R@1": "T2I", "I2T R@1": "I2T"}
SETTINGS = {"CLIP alone": "--cal none"}
SETTINGS |= {f"soft, β = {beta}": f"--cal ce --beta {beta}" for beta in (0, 0.25, 0.5, 0.75, 1)}
SETTINGS |= {"soft, β = 0.5, no phrases": "--cal ce --beta 0.5 --phrases 0",
             "soft, β = 0.5, no sentences": "--cal ce --beta 0.5 --sentences 0"}
SETTINGS |= {f"hard, β = {beta}": f"--cal bce --beta {beta}" for beta in (0, 0.25, 0.5, 0.75, 1)}
THRICE = ("CLIP alone", "soft, β = 0.5", "hard, β = 0.5", "soft, β = 0.5, no phrases")


def folder(setting, seed):
    return RUNS / f"{SETTINGS[setting].replace('--', '').replace(' ', '-')}-seed{seed}"


def run(setting, seed):
    out = folder(setting, seed)
    if (out / "eval.json").is_file():
        return
    print(f"{setting}, seed {seed}", flush=True)
    flags = [*SETTINGS[setting].split(), "--seed", str(seed), "--out", str(out)]
    flags += ["--model", "wide", "--epochs", "8"] if CUDA else ["--workers", "1"]
    threads = {} if CUDA else {"OMP_NUM_THREADS": "1"}  # two processes of two threads on two cores would be many times slower
    with open(f"{out}.log", "w") as log:
        if subprocess.run([sys.executable, "train.py", *flags], cwd=ROOT, env=os.environ | threads, stdout=log, stderr=log).returncode:
            print(f"failed: {setting}, seed {seed}: see {out}.log", flush=True)


def row(setting):
    """A line of the table: mean ± standard deviation over the seeds that are done."""
    files = [folder(setting, seed) / "eval.json" for seed in range(3)]
    scores = [json.loads(file.read_text())["scenes"] for file in files if file.is_file()]
    cells = [[score[column] for score in scores] for column in COLUMNS]
    return f"| {setting} | {len(scores)} | " + " | ".join(
        f"{statistics.mean(cell):.1f}" + (f" ± {statistics.stdev(cell):.1f}" if len(cell) > 1 else "") if cell else "" for cell in cells) + " |"


def main():
    if "--table" not in sys.argv:
        RUNS.mkdir(parents=True, exist_ok=True)
        jobs = [(setting, seed) for seed in range(3) for setting in sorted(SETTINGS, key=lambda s: s not in THRICE)
                if not seed or CUDA or setting in THRICE]
        with ThreadPoolExecutor(1 if CUDA else os.cpu_count()) as pool:
            list(pool.map(lambda job: run(*job), jobs))
    print("| setting | seeds | " + " | ".join(COLUMNS.values()) + " |\n| --- | ---: |" + " ---: |" * len(COLUMNS))
    print("\n".join(map(row, SETTINGS)))


if __name__ == "__main__":
    main()
