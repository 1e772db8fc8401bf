"""Evaluate a β-CLIP: retrieval with CLS against EOS, fine-grained discrimination with patches (SPEC §7).

    python eval.py --bench scenes                      # the latest run under runs/
    python eval.py --bench scenes --ckpt RUN --json scores.json
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.ops import roi_align

import data
import model as models

LEVELS = ("hard", "medium", "easy", "trivial")
BATCH = 1024  # images, or texts, encoded at a time


def recall(similarity, owner, ks=(1, 5, 10)):
    """R@k in per cent, text to image and image to text.

    similarity [T, I]: texts by images; owner [T]: each text's image. Images may have several texts: the best
    counts. Ties, and NaN, count against the model, so that equal scores earn nothing.
    """
    own = similarity.gather(1, owner[:, None])                                       # [T, 1]
    t2i = (~(similarity < own)).sum(1) - 1                                           # [T] rank of the image, from 0
    mine = owner[:, None] == torch.arange(similarity.shape[1], device=owner.device)  # [T, I]
    best = similarity.masked_fill(~mine, -torch.inf).amax(0)                         # [I]
    i2t = (~(similarity.masked_fill(mine, -torch.inf) < best)).sum(0)                # [I]
    return {f"{name} R@{k}": 100 * (rank < k).double().mean().item() for name, rank in (("T2I", t2i), ("I2T", i2t)) for k in ks}


def hits(scores):
    """scores [R, E], the positive first (-inf where a row has fewer) -> [R] bool. A tie counts as a hit (SPEC §7)."""
    return scores[:, 0] >= scores[:, 1:].amax(1)


def box_embeddings(patches, boxes, image):
    """RoIAlign of boxes on the patch grid, L2-normalised (FG-OVD's protocol, SPEC §7).

    patches [B, P, D]; boxes [R, 4] (x, y, w, h) as fractions of the image; image [R]: index into B -> [R, D]
    """
    side = int(patches.shape[1] ** 0.5)
    grid = patches.transpose(1, 2).unflatten(2, (side, side))                        # [B, D, side, side]
    corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1) * side
    rois = torch.cat([image[:, None].to(corners), corners], dim=1)                   # [R, 5]
    return F.normalize(roi_align(grid, rois, output_size=1, sampling_ratio=-1, aligned=True).flatten(1), dim=-1)


def embed_texts(model, tokenizer, texts):
    """Texts (list of N str) -> [N, D], normalised."""
    ids = data.tokenize(tokenizer, texts, model.context)
    return F.normalize(torch.cat([model.encode_text(ids[at:at + BATCH]) for at in range(0, len(ids), BATCH)]), dim=-1)


def scenes(model, tokenizer):
    """The built-in benchmark: retrieval over all test scenes, FG-OVD's protocol on the boxes of the originals."""
    drawn = [data.scene("test", index) for index in range(data.SPLITS["test"])]
    cls, kept = [], []
    for at in range(0, len(drawn), BATCH):
        pixels = torch.stack([data.to_pixels(data.draw(one), model.image_size) for one in drawn[at:at + BATCH]]).to(model.device)
        c, patches = model.encode_image(pixels)
        cls.append(F.normalize(c, dim=-1))
        kept.append(patches)
    captions = embed_texts(model, tokenizer, [". ".join(data.describe(one)[0]) for one in drawn])
    scores = recall(captions @ torch.cat(cls).T, torch.arange(len(drawn), device=model.device))

    rows = data.scene_boxes()
    boxes = torch.tensor([row["box"] for row in rows], device=model.device) / data.SIZE
    regions = box_embeddings(torch.cat(kept), boxes, torch.tensor([row["image"] for row in rows], device=model.device))  # [R, D]
    place = {}
    which = {split: torch.tensor([[place.setdefault(text, len(place)) for text in row[split]] for row in rows]) for split in LEVELS}
    expressions = embed_texts(model, tokenizer, list(place))
    fine = {}
    for split, index in which.items():
        fine[split] = 100 * hits((expressions[index.to(model.device)] @ regions[:, :, None]).squeeze(2)).double().mean().item()
    return fine | scores


BENCHES = {"scenes": scenes}
CHANCE = {"scenes": dict.fromkeys(LEVELS, 100 / 11)
          | {f"{way} R@{k}": 100 * k / data.SPLITS["test"] for way in ("T2I", "I2T") for k in (1, 5, 10)}}


@torch.inference_mode()
def evaluate(model, tokenizer, benches):
    """Bench names -> {bench: {metric: per cent}}."""
    model.eval()
    torch.set_float32_matmul_precision("highest")  # training may have lowered it
    return {bench: BENCHES[bench](model, tokenizer) for bench in benches}


def table(results):
    """The results as one aligned table."""
    lines = [f"{'bench':<10}{'metric':<10}{'score %':>8}{'chance %':>10}"]
    for bench, scores in results.items():
        lines += [f"{bench:<10}{metric:<10}{score:>8.1f}{CHANCE[bench][metric]:>10.1f}" for metric, score in scores.items()]
    return "\n".join(lines)


def latest_run(root="runs"):
    runs = sorted(Path(root).glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
    if not runs:
        data.fail(f"no run under {root}/: train one with `torchrun train.py --beta 0.5`, or name one with --ckpt")
    return runs[-1].parent


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = data.fail
    parser.add_argument("--bench", nargs="+", choices=BENCHES, default=["scenes"])
    parser.add_argument("--ckpt", help="a run's folder (default: the latest under runs/)")
    parser.add_argument("--json", help="write the scores here too")
    args = parser.parse_args(argv)
    if args.json and not Path(args.json).absolute().parent.is_dir():
        data.fail(f"--json {args.json}: there is no such folder")
    source = args.ckpt or latest_run()
    try:
        model, tokenizer = models.load(source), models.load_tokenizer(source)
    except (OSError, ValueError) as error:
        data.fail(f"--ckpt {source}: {str(error).splitlines()[0]}")
    results = evaluate(model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, args.bench)
    print(f"{source}\n{table(results)}")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
