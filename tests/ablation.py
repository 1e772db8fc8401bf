"""The paper's ablation at the scale of the built-in scenes, run by hand: it launches train.py and tabulates what that measured.

    python tests/ablation.py            # runs what is not done yet, under runs/ablation/, then prints the table
    python tests/ablation.py --table    # only the table of what is done

Each run uses one core, as many run at a time as there are (with CUDA: one after the other). A run that was stopped
goes on where its checkpoint stands. On a CPU only `none` and β = 0.5 of either form get three seeds.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "ablation"
COLUMNS = {"hard": "Hard", "medium": "Medium", "easy": "Easy", "trivial": "Trivial", "T2I R@1": "T2I", "I2T R@1": "I2T"}
SETTINGS = {"CLIP alone": "--cal none"}
SETTINGS |= {f"soft, β = {beta}": f"--cal ce --beta {beta}" for beta in (0, 0.25, 0.5, 0.75, 1)}
SETTINGS |= {f"hard, β = {beta}": f"--cal bce --beta {beta}" for beta in (0, 0.25, 0.5, 0.75, 1)}
SETTINGS |= {"soft, β = 0.5, no phrases": "--cal ce --beta 0.5 --phrases 0",
             "soft, β = 0.5, no sentences": "--cal ce --beta 0.5 --sentences 0"}
THRICE = ("CLIP alone", "soft, β = 0.5", "hard, β = 0.5")


def folder(setting, seed):
    return RUNS / f"{SETTINGS[setting].replace('--', '').replace(' ', '-')}-seed{seed}"


def run(setting, seed):
    if not (folder(setting, seed) / "eval.json").is_file():
        print(f"{setting}, seed {seed}", flush=True)
        flags = [*SETTINGS[setting].split(), "--seed", str(seed), "--out", str(folder(setting, seed)), "--workers", "1"]
        subprocess.run([sys.executable, "train.py", *flags], cwd=ROOT, check=True, capture_output=True, text=True,
                       env=os.environ | ({} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"}))


def row(setting):
    """A line of the table: mean ± standard deviation over the seeds that are done."""
    files = [folder(setting, seed) / "eval.json" for seed in range(3)]
    scores = [json.loads(file.read_text())["scenes"] for file in files if file.is_file()]
    cells = [[score[column] for score in scores] for column in COLUMNS]
    return f"| {setting} | {len(scores)} | " + " | ".join(
        f"{statistics.mean(cell):.1f}" + (f" ± {statistics.stdev(cell):.1f}" if len(cell) > 1 else "") if cell else "" for cell in cells) + " |"


def main():
    cuda = torch.cuda.is_available()
    if "--table" not in sys.argv:
        jobs = [(setting, seed) for seed in range(3) for setting in sorted(SETTINGS, key=lambda s: s not in THRICE)
                if not seed or cuda or setting in THRICE]
        with ThreadPoolExecutor(1 if cuda else os.cpu_count()) as pool:
            list(pool.map(lambda job: run(*job), jobs))
    print("| setting | seeds | " + " | ".join(COLUMNS.values()) + " |\n| --- | ---: |" + " ---: |" * len(COLUMNS))
    print("\n".join(map(row, SETTINGS)))


if __name__ == "__main__":
    main()
