"""The paper's ablation at the scale of the scenes, and what the pooler attends to. Run by hand.

    python tests/ablation.py            # train what is not trained yet, and print the tables
    python tests/ablation.py --table    # only the tables of what is trained

Each row is trained with three seeds, which decide everything: weights, samples, their order. A run
that was stopped resumes; runs/ablation/NAME.log has its output. On a CPU there are as many runs at
a time as cores, with one thread each.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from transformers import CLIPTokenizer  # noqa: E402

import data  # noqa: E402
import eval as evaluation  # noqa: E402
from model import BetaCLIP, load  # noqa: E402

RUNS = ROOT / "runs" / "ablation"
SEEDS = (0, 1, 2)
COLUMNS = {"hard": "Hard", "medium": "Medium", "easy": "Easy", "trivial": "Trivial",
           "pointing": "pointing", "T2I R@1": "T2I", "I2T R@1": "I2T",
           "pooled T2I R@1": "pooled T2I", "pooled I2T R@1": "pooled I2T", "attention": "attention"}
ROWS = {  # name: flags, Hard and T2I (Urban1K) in the paper
    "L_clip only": ("--cal none", "22.0 / 88.6"),
    "CE, β = 0.5": ("--cal ce --beta 0.5", "30.9 / 89.0"),
    "CE, β = 0": ("--cal ce --beta 0", "3.6 / 90.7"),
    "CE, β = 1": ("--cal ce --beta 1", "30.8 / 88.7"),
    "CE, no phrases": ("--cal ce --phrases 0", "29.2 / 87.9"),
    "CE, no sentences": ("--cal ce --sentences 0", ""),
    "CE, caption alone": ("--cal ce --sentences 0 --phrases 0", "22.0 / 88.4"),
    "BCE, β = 0.5": ("--cal bce --beta 0.5", "20.1 / 91.8"),
    "BCE, β = 0": ("--cal bce --beta 0", "14.8 / 91.9"),
    "BCE, β = 1": ("--cal bce --beta 1", "20.2 / 92.0"),
    "CE, after L_clip only": ("--cal ce --model {start} --max-steps 400", ""),
    "the same, pooler at 100 × the rate": (
        "--cal ce --model {start} --max-steps 400 --lr 1e-4 --lr-pooler 1e-2", ""),
    "the same, pooler warmed up": ("--cal ce --model {warm} --max-steps 400", ""),
}
STARTS = {  # what some rows start from
    "start": "--cal none",
    "warm": "--cal ce --model {start} --max-steps 200 --lr 0 --lr-pooler 1e-2",
}
FINDINGS = (  # of the paper: text, rows, metric, difference there
    ("CE gains in Hard", "CE, β = 0.5", "L_clip only", "hard", 8.9),
    ("CE leaves T2I as it is", "CE, β = 0.5", "L_clip only", "T2I R@1", 0.4),
    ("CE, β = 0 ruins Hard", "CE, β = 0", "L_clip only", "hard", -18.4),
    ("CE, β = 0 helps T2I", "CE, β = 0", "L_clip only", "T2I R@1", 2.1),
    ("β = 1 equals β = 0.5 in Hard", "CE, β = 1", "CE, β = 0.5", "hard", -0.1),
    ("BCE gains in T2I", "BCE, β = 0.5", "L_clip only", "T2I R@1", 3.2),
    ("BCE loses in Hard", "BCE, β = 0.5", "L_clip only", "hard", -1.9),
    ("BCE, β = 0 is below BCE, β = 0.5 in Hard", "BCE, β = 0", "BCE, β = 0.5", "hard", -5.3),
    ("phrases add to Hard", "CE, β = 0.5", "CE, no phrases", "hard", 1.7),
    ("a caption query alone adds nothing to Hard", "CE, caption alone", "L_clip only", "hard", 0.0),
)


def folder(flags: str, seed: int) -> Path:
    """The folder of a run: named after its flags, so that equal ones are trained once."""
    name = flags.replace("--", "").replace("{", "").replace("}", "").replace(" ", "-")
    return RUNS / f"{name}-seed{seed}"


def train(flags: str, seed: int) -> None:
    """Train, or resume, one run."""
    out = folder(flags, seed)
    if (out / "eval.json").is_file():
        return
    starts = {name: folder(start_flags, seed) for name, start_flags in STARTS.items()}
    command = [sys.executable, "train.py", "--seed", str(seed), "--out", str(out), "--workers", "0",
               "--eval-every", "1000", *flags.format(**starts).split()]
    threads = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"}
    with open(f"{out}.log", "a", encoding="utf-8") as log:
        done = subprocess.run(command, cwd=ROOT, env=os.environ | threads, stdout=log, stderr=log)
    print(f"{out.name}: {f'failed, see {out}.log' if done.returncode else 'done'}", flush=True)


def train_all() -> None:
    RUNS.mkdir(parents=True, exist_ok=True)
    jobs = 1 if torch.cuda.is_available() else os.cpu_count()
    for all_flags in ([flags for flags, _ in ROWS.values() if "{" not in flags],
                      [STARTS["warm"]],
                      [flags for flags, _ in ROWS.values() if "{" in flags]):
        with ThreadPoolExecutor(jobs) as pool:
            for seed in SEEDS:
                for flags in all_flags:
                    pool.submit(train, flags, seed)


@torch.no_grad()
def attention_on_own_quarter(model: BetaCLIP, tokenizer: CLIPTokenizer) -> float:
    """How much of the pooler's attention, in per cent, is on the quarter that a query describes. If
    it looked nowhere in particular, 25."""
    shares = []
    for index in range(0, data.NUM_SCENES["test"], data.GROUP_SIZE):
        scene = data.make_scene("test", index)
        queries = [data.describe_object(obj) for obj in scene]
        heat = evaluation.compute_heatmaps(model, tokenizer, data.draw_scene(scene), queries)
        half = heat["attention"].shape[1] // 2
        for quarter, query_heat in enumerate(heat["attention"]):
            own = query_heat.unflatten(1, (2, half)).unflatten(0, (2, half))
            shares.append(own[quarter // 2, :, quarter % 2].sum().item())
    return 100 * statistics.mean(shares)


def scores_of(flags: str, seed: int) -> dict[str, float]:
    """The scores that train.py wrote, and those that need the pooler; {} if it is not trained."""
    out = folder(flags, seed)
    if not (out / "eval.json").is_file():
        return {}
    pooler_file = out / "pooler.json"
    if not pooler_file.is_file():
        scores = {}
        model, tokenizer = load(out)
        if model.use_pooler:
            task = evaluation.load_benchmark("scenes", "")
            scores = evaluation.evaluate_conditioned(model, tokenizer, task)
            scores["attention"] = attention_on_own_quarter(model, tokenizer)
        pooler_file.write_text(json.dumps(scores), encoding="utf-8")
    scores = json.loads((out / "eval.json").read_text(encoding="utf-8"))["scenes"]
    return scores | json.loads(pooler_file.read_text(encoding="utf-8"))


def mean_and_deviation(values: list[float]) -> str:
    if len(values) < 2:
        return "".join(f"{value:.1f}" for value in values)
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def main() -> None:
    if "--table" not in sys.argv:
        train_all()
    scores = {name: [scores_of(flags, seed) for seed in SEEDS]
              for name, (flags, _) in ROWS.items()}
    print(f"| setting | {' | '.join(COLUMNS.values())} | paper |\n| --- |{' ---: |' * 11}")
    for name, (_, paper) in ROWS.items():
        cells = [mean_and_deviation([run[metric] for run in scores[name] if metric in run])
                 for metric in COLUMNS]
        print(f"| {name} | {' | '.join(cells)} | {paper} |")
    print("\n| the paper finds | there | here | the difference here |\n| --- | ---: | ---: | --- |")
    for text, name, other_name, metric, paper in FINDINGS:
        if not all(scores[name] + scores[other_name]):
            continue
        pairs = zip(scores[name], scores[other_name], strict=True)
        differences = [run[metric] - other[metric] for run, other in pairs]
        verdict = "no clear difference"
        mean = statistics.mean(differences)
        if abs(mean) > 2 * statistics.stdev(differences):
            verdict = "same direction" if (mean > 0) == (paper > 0) else "other direction"
        print(f"| {text} | {paper:+.1f} | {mean_and_deviation(differences)} | {verdict} |")


if __name__ == "__main__":
    main()
