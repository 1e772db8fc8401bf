"""The paper's ablation at the scale of the scenes, run by hand: launches train.py, tabulates its scores.

    python tests/ablation.py            # runs what is not done yet, under runs/ablation/; prints the table
    python tests/ablation.py --table    # only the table of what is done

All rows start from one base, but for the last two, with three seeds of the fine-tuning. What was stopped
resumes; its output is in NAME.log. On a CPU, as many runs at a time as there are cores, one thread each.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the scripts are no package
import torch
import torch.nn.functional as F

import data
import eval as evaluation

RUNS = ROOT / "runs" / "ablation"
COLUMNS = {"hard": "Hard", "medium": "Medium", "easy": "Easy", "trivial": "Trivial", "pointing": "pointing",
           "attention": "attention", "T2I R@1": "T2I", "I2T R@1": "I2T"}
ROWS = {  # name: base, flags
    "CLIP alone": (0, "--cal none"),
    "soft, β = 0.5": (0, "--cal ce --beta 0.5"),
    "hard, β = 0.5": (0, "--cal bce --beta 0.5"),
    "hard, weight B·K": (0, "--cal bce --cal-weight 896"),
    "soft, weight 4": (0, "--cal ce --cal-weight 4"),
    "soft, β = 0": (0, "--cal ce --beta 0"),
    "soft, β = 1": (0, "--cal ce --beta 1"),
    "soft, no phrases": (0, "--cal ce --phrases 0"),
    "soft, no sentences": (0, "--cal ce --sentences 0"),
    "soft, ten times the pooler's rate": (0, "--cal ce --lr-pooler 1e-2"),
    "CLIP alone, second base": (1, "--cal none"),
    "soft, β = 0.5, second base": (1, "--cal ce --beta 0.5"),
}

def folder(row, seed):
    base, flags = ROWS[row]
    return RUNS / f"base{base}-{flags.replace('--', '').replace(' ', '-')}-seed{seed}"

def run(out, flags):
    """One training, where it is not done yet."""
    if (out / "eval.json").is_file():
        return
    threads = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"}
    with open(f"{out}.log", "w") as log:
        command = [sys.executable, "train.py", *flags.split(), "--out", str(out)]
        code = subprocess.run(command, cwd=ROOT, env=os.environ | threads, stdout=log, stderr=log).returncode
    print(f"{out.name}: {'done' if not code else f'failed, see {out}.log'}", flush=True)

@torch.inference_mode()
def attention(run):
    """{"attention": weight that the pooler puts on a description's own quarter, in per cent; 25 is blind}"""
    model, tokenizer = evaluation.load(run)
    if not model.has_trained_pooler:
        return {}
    scenes = [data.scene("test", index) for index in range(0, data.SPLITS["test"], data.SIBLINGS)]
    texts = [data.expression(thing) for scene in scenes for thing in scene["objects"]]
    texts, own = evaluation.embed_texts(model, tokenizer, texts).unflatten(0, (-1, 4)), []    # [I, 4, D]
    for part, _, _, patches in evaluation.encode_images(model, data.paint, scenes):
        patches = F.normalize(patches, dim=-1)
        weights = model.pooler.attn(texts[part], patches, patches)[1].unflatten(2, (8, 8))   # [b, 4, 8, 8]
        own.append(16 * F.avg_pool2d(weights, 4).flatten(2).diagonal(dim1=1, dim2=2))        # [b, 4]
    return {"attention": 100 * torch.cat(own).mean().item()}

def line(row):
    """A line of the table: mean ± standard deviation over the seeds that are done."""
    runs = [folder(row, seed) for seed in range(3) if (folder(row, seed) / "eval.json").is_file()]
    scores = [json.loads((run / "eval.json").read_text())["scenes"] | attention(run) for run in runs]
    cells = []
    for column in COLUMNS:
        cell = [score[column] for score in scores if column in score]
        spread = f" ± {statistics.stdev(cell):.1f}" if len(cell) > 1 else ""
        cells.append(f"{statistics.mean(cell):.1f}{spread}" if cell else "")
    return f"| {row} | {len(scores)} | {' | '.join(cells)} |"

if __name__ == "__main__":
    if "--table" not in sys.argv:
        RUNS.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(1 if torch.cuda.is_available() else os.cpu_count()) as pool:
            flags = "--model scratch --cal none --sentences 1 --epochs 0.64 --seed"
            for base in [pool.submit(run, RUNS / f"base{base}", f"{flags} {base}") for base in (0, 1)]:
                base.result()
            for row, (base, flags) in ROWS.items():
                for seed in range(3):
                    pool.submit(run, folder(row, seed), f"{flags} --seed {seed} --model {RUNS}/base{base}/hf")
    print(f"| setting | seeds | {' | '.join(COLUMNS.values())} |\n| --- | ---: |{' ---: |' * len(COLUMNS)}")
    for row in ROWS:
        print(line(row), flush=True)
