"""Evaluate a β-CLIP: retrieval by CLS and EOS, fine-grained discrimination by patches (paper, section 5).

    python eval.py --bench scenes                                  # the latest run under runs/
    python eval.py --bench urban1k fgovd --root DATA --ckpt RUN    # --bench all: those that are there
    python eval.py --bench pairs.jsonl --root IMAGES --ckpt RUN    # retrieval on your own images and captions
    torchrun --nproc_per_node 8 eval.py --bench coco --root DATA   # on several processes
    python eval.py --heatmap IMAGE "a red star" "a blue circle" --ckpt RUN OTHER_RUN --out heat.png

--ckpt takes a run's folder, an authors' .pt, or a Hugging Face CLIP (hub name or folder).
"""

import json
import os
import sys
import textwrap
import zipfile
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.datasets
from filelock import FileLock
from huggingface_hub import hf_hub_download
from PIL import Image, ImageDraw, ImageFont
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import roi_align
from tqdm import tqdm

import data
import model as models

BATCH = 256                      # images, or texts, encoded at a time
TIMEOUT = timedelta(minutes=30)  # of collectives


# ---------------------------------------------------------------------------------------------- metrics

def recall(similarity, owner, ks=(1, 5, 10)):
    """R@k in per cent, text to image and image to text.

    similarity [T, I]: texts by images; owner [T]: each text's image, whose best text counts. Ties, and NaN,
    count against the model, so that equal scores earn nothing.
    """
    own = similarity.gather(1, owner[:, None])                                         # [T, 1]
    t2i = (~(similarity < own)).sum(1) - 1                                             # [T] rank of the image
    is_own = owner[:, None] == torch.arange(similarity.shape[1], device=owner.device)  # [T, I]
    best = similarity.masked_fill(~is_own, -torch.inf).amax(0)                         # [I]
    i2t = (~(similarity.masked_fill(is_own, -torch.inf) < best)).sum(0)                # [I] rank of a text
    return {f"{name} R@{k}": 100 * (rank < k).double().mean().item()
            for name, rank in (("T2I", t2i), ("I2T", i2t)) for k in ks}


def hits(scores):
    """scores [R, E], the positive first (-inf where a row has fewer) -> [R] bool. A tie is a hit."""
    return scores[:, 0] >= scores[:, 1:].amax(1)


def box_embeddings(patches, boxes, image):
    """RoIAlign of boxes on the grid of patches, L2-normalised (FG-OVD's protocol).

    patches [B, P, D]; boxes [R, 4] (x, y, w, h) as fractions of the image; image [R]: index into B -> [R, D]
    """
    side = int(patches.shape[1] ** 0.5)
    grid = patches.transpose(1, 2).unflatten(2, (side, side))                         # [B, D, side, side]
    corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1) * side
    rois = torch.cat([image[:, None].to(corners), corners], dim=1)                    # [R, 5]
    regions = roi_align(grid, rois, output_size=1, sampling_ratio=-1, aligned=True)   # [R, D, 1, 1]
    return F.normalize(regions.flatten(1), dim=-1)


# --------------------------------------------------------------------------------------------- encoding

def rank_and_world():
    """This process's rank, and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main():
    """Whether this process is the one that prints and writes."""
    return rank_and_world()[0] == 0


def shard(count):
    """The part of range(count) that this process works on."""
    rank, world = rank_and_world()
    return range(rank, count, world)


def sum_over_ranks(rows):
    """Rows that are zero but for this process's shard -> the rows of all processes, on each of them."""
    if dist.is_initialized():
        dist.all_reduce(rows)
    return rows


def embed_texts(model, tokenizer, texts):
    """Texts (list of N str) -> [N, D], normalised. Each distinct text is encoded once."""
    row = {text: number for number, text in enumerate(sorted(set(texts), key=lambda text: (len(text), text)))}
    distinct, rows = list(row), torch.zeros(len(row), model.dim, device=model.device)
    own = shard(len(distinct))
    for start in range(0, len(own), BATCH):
        part = own[start:start + BATCH]
        ids = data.tokenize(tokenizer, [distinct[i] for i in part], [model.context] * len(part))
        rows[part] = model.encode_text(models.pack(ids).to(model.device))
    return F.normalize(sum_over_ranks(rows), dim=-1)[[row[text] for text in texts]]


def encode_images(model, load, items, whole=False):
    """Encode this process's shard of `items`; threads read ahead. `load(item)` -> PIL image.

    Yields positions in `items` (list of b), their sizes in pixels [b, 2], cls [b, D], patches [b, P, D].
    """
    def read(position):
        image = load(items[position])
        return image.size, data.to_pixels(image, model.image_size, whole)

    own = shard(len(items))
    parts = [own[start:start + BATCH] for start in range(0, len(own), BATCH)]
    with ThreadPoolExecutor() as pool:
        ahead = pool.map(read, parts[0]) if parts else ()
        for number, part in enumerate(tqdm(parts, desc="images", disable=len(parts) < 8 or not is_main())):
            sizes, pixels = zip(*ahead)
            ahead = pool.map(read, parts[number + 1]) if number + 1 < len(parts) else ()
            pixels = data.normalize(torch.stack(pixels).to(model.device))
            yield list(part), torch.tensor(sizes, device=model.device), *model.encode_image(pixels)


# -------------------------------------------------------------------------------------------- protocols

def retrieval(model, tokenizer, load, items, texts, owner):
    """R@k over a whole set, CLS against EOS. owner (list): each text's place in `items`."""
    texts = embed_texts(model, tokenizer, texts)                                      # [T, D]
    images = torch.zeros(len(items), model.dim, device=model.device)                  # [I, D]
    for part, _, cls, _ in encode_images(model, load, items):
        images[part] = F.normalize(cls, dim=-1)
    return recall(texts @ sum_over_ranks(images).T, torch.tensor(owner, device=model.device))


def fine_grained(model, tokenizer, load, items, splits):
    """FG-OVD: each image and each expression is encoded once for all splits -> {split: accuracy in per cent}.

    splits: {split: [(place in items, box (x, y, w, h) in pixels, [positive, *negatives])]}
    """
    rows = [row for split in splits.values() for row in split]
    boxes = torch.tensor([box for _, box, _ in rows], dtype=torch.float32, device=model.device)    # [R, 4]
    rows_of = {}
    for number, (place, _, _) in enumerate(rows):
        rows_of.setdefault(place, []).append(number)
    regions = torch.zeros(len(rows), model.dim, device=model.device)
    for part, sizes, _, patches in encode_images(model, load, items, whole=True):
        own = [number for place in part for number in rows_of[place]]
        image = torch.tensor([i for i, place in enumerate(part) for _ in rows_of[place]], device=model.device)
        regions[own] = box_embeddings(patches, boxes[own] / sizes[image].repeat(1, 2), image)
    regions = sum_over_ranks(regions)                                                 # [R, D]
    for number in (regions.norm(dim=1) == 0).nonzero()[:1, 0].tolist():  # which would tie, and so hit
        raise data.InputError(f"{items[rows[number][0]]}: box {rows[number][1]} lies outside of the image")

    row = {}
    expressions = [torch.tensor([row.setdefault(text, len(row)) for text in texts]) for *_, texts in rows]
    expressions = pad_sequence(expressions, batch_first=True, padding_value=-1).to(model.device)  # [R, E]
    texts = embed_texts(model, tokenizer, list(row))
    scores = torch.cat([(texts[e] @ r[:, :, None]).squeeze(2)
                        for e, r in zip(expressions.split(BATCH), regions.split(BATCH))])         # [R, E]
    good = hits(scores.masked_fill(expressions < 0, -torch.inf)).double()
    good = good.split([len(split) for split in splits.values()])
    return {split: 100 * part.mean().item() for split, part in zip(splits, good)}


def pointing(model, tokenizer, images, descriptions):
    """How often a description is most similar, in the mean, to the patches of its own quarter, in per cent.

    descriptions: of the four quarters of each image, in the order of data.PLACES, one flat list
    """
    texts = embed_texts(model, tokenizer, descriptions).unflatten(0, (-1, 4))         # [I, 4, D]
    found = torch.zeros(len(images), device=model.device)
    for part, _, _, patches in encode_images(model, data.draw, images):
        heat = texts[part] @ F.normalize(patches, dim=-1).transpose(1, 2)             # [b, 4, P]
        half = int(heat.shape[2] ** 0.5) // 2
        quarters = F.avg_pool2d(heat.unflatten(2, (2 * half, 2 * half)), half).flatten(2)         # [b, 4, 4]
        found[part] = (quarters.argmax(2) == torch.arange(4, device=heat.device)).float().mean(1)
    return 100 * sum_over_ranks(found).mean().item()


TEMPLATES = ("a photo of a {}.", "a photo of the {}.", "a close-up photo of a {}.", "a photo of a small {}.",
             "a photo of a large {}.")


def zero_shot(model, tokenizer, dataset):
    """Classification by the mean of prompts of the class names, on a torchvision data set -> top-1, top-5."""
    names = [(name if isinstance(name, str) else name[0]).replace("_", " ") for name in dataset.classes]
    prompts = embed_texts(model, tokenizer, [prompt.format(name) for name in names for prompt in TEMPLATES])
    prompts = F.normalize(prompts.unflatten(0, (len(names), -1)).mean(1), dim=-1)     # [C, D]
    label, ranks = {}, torch.zeros(len(dataset), device=model.device)

    def load(item):
        image, label[item] = dataset[item]
        return image

    for part, _, cls, _ in encode_images(model, load, range(len(dataset))):
        scores = F.normalize(cls, dim=-1) @ prompts.T                                 # [b, C]
        own = scores.gather(1, torch.tensor([[label[item]] for item in part], device=model.device))
        ranks[part] = ((~(scores < own)).sum(1) - 1).float()                          # ties count against
    ranks = sum_over_ranks(ranks)
    return {f"top-{k}": 100 * (ranks < k).double().mean().item() for k in (1, 5)}


# ------------------------------------------------------------------------------------------- benchmarks

def scenes(model, tokenizer, split="test"):
    """The built-in benchmark: FG-OVD's protocol and `pointing` on the original scenes, retrieval on all."""
    drawn = [data.scene(split, index) for index in range(data.SPLITS[split])]
    rows, originals = data.scene_boxes(split), drawn[::data.SIBLINGS]
    levels = {level: [(row["image"], row["box"], row[level]) for row in rows] for level in FGOVD}
    scores = fine_grained(model, tokenizer, data.draw, originals, levels)
    scores["pointing"] = pointing(model, tokenizer, originals, [row["hard"][0] for row in rows])
    captions = [". ".join(data.describe(scene)[0]) for scene in drawn]
    return scores | retrieval(model, tokenizer, data.draw, drawn, captions, range(len(drawn)))


# Each reader yields (image, its captions); an image is the name of a file under `root`.

def urban1k(root):
    if not (root / "Urban1k").exists():
        fetch_urban1k(root)
    for path in sorted(root.glob("Urban1k/image/*.jpg"), key=lambda path: (len(path.stem), path.stem)):
        caption = root / f"Urban1k/caption/{path.stem}.txt"
        yield f"Urban1k/image/{path.name}", caption.read_text("utf-8-sig").splitlines()[:1]


def fetch_urban1k(root):
    root.mkdir(parents=True, exist_ok=True)
    try:
        archive = hf_hub_download("BeichenZhang/Urban1k", "Urban1k.zip", repo_type="dataset")
    except Exception as error:  # the hub's errors have no ancestor in common
        raise data.InputError(f"no {root}/Urban1k, and the hub cannot be reached: unpack Urban1k.zip of "
                              "https://huggingface.co/datasets/BeichenZhang/Urban1k there") from error
    with FileLock(root / ".urban1k.lock"):  # of several processes one unpacks it
        if not (root / "Urban1k").exists():
            zipfile.ZipFile(archive).extractall(root / ".urban1k")
            (root / ".urban1k/Urban1k").rename(root / "Urban1k")


def sv1k(root):
    rows, image, caption = data.read_rows(root / data.SHAREGPT4V)
    for row in rows.select(range(min(data.HELD_OUT, len(rows)))):
        yield row[image], [data.clean(text) for text in data.captions_of(row[caption])]


def dci(root, short=False):
    home = root / "densely_captioned_images"
    splits = json.loads((home / "splits.json").read_text())
    for name in sorted(name for split in splits.values() for name in split):
        row = json.loads((home / "annotations" / name).with_suffix(".json").read_text())
        caption = f"{row['short_caption']}\n{row['extra_caption']}" if short else row["extra_caption"]
        yield f"densely_captioned_images/photos/{row['image']}", [caption]


def coco(root):
    whole, captions = json.loads((root / "captions_val2017.json").read_text()), {}
    for row in whole["annotations"]:
        captions.setdefault(row["image_id"], []).append(row["caption"])
    for row in whole["images"]:
        yield f"val2017/{row['file_name']}", captions[row["id"]]


def flickr30k(root):
    for row in json.loads((root / "dataset_flickr30k.json").read_text())["images"]:
        if row["split"] == "test":
            yield f"flickr30k-images/{row['filename']}", [sentence["raw"] for sentence in row["sentences"]]


def fgovd(root, split):
    """Yields (image, box, [positive, *negatives])."""
    for line in (root / FGOVD[split]).read_text().splitlines():
        row = json.loads(line)
        x, y, w, h = map(float, row["bbox"])
        expressions = row["pos_expression"][:1] + row["neg_expression"]
        if min(w, h) <= 0 or len(expressions) < 2 or not all(isinstance(text, str) for text in expressions):
            raise ValueError("needs a bbox of positive size, a pos_expression and a neg_expression")
        yield row["img_path"], (x, y, w, h), expressions


RETRIEVAL = {  # what lies under --root, its reader, the number of images
    "urban1k": ("Urban1k", urban1k, 1000),
    "sv1k": (data.SHAREGPT4V, sv1k, 1000),
    "dci": ("densely_captioned_images", dci, 7805),
    "dci-short": ("densely_captioned_images", partial(dci, short=True), 7805),
    "coco": ("captions_val2017.json", coco, 5000),
    "flickr30k": ("dataset_flickr30k.json", flickr30k, 1000),
}
FGOVD = {"hard": "h_attributes_llava.jsonl", "medium": "m_attributes_llava.jsonl",
         "easy": "e_attributes_llava.jsonl", "trivial": "shuffle_negatives_llava.jsonl"}
CLASSIFICATION = {
    "cifar10": ("cifar-10-batches-py", lambda root: torchvision.datasets.CIFAR10(root, False, download=True)),
    "cifar100": ("cifar-100-python", lambda root: torchvision.datasets.CIFAR100(root, False, download=True)),
    "food101": ("food-101", lambda root: torchvision.datasets.Food101(root, "test", download=True)),
    "imagenet": ("imagenet", lambda root: torchvision.datasets.ImageNet(root / "imagenet", "val")),
}
FILES = {bench: file for bench, (file, *_) in (RETRIEVAL | CLASSIFICATION).items()} | {"fgovd": FGOVD["hard"]}
PUBLISHED = {  # the paper's figures of ViT-B/16, β = 0.5, K = 36; of the scenes, chance
    ("urban1k", "T2I R@1"): "ce 89.0, bce 91.8", ("urban1k", "I2T R@1"): "ce 88.6, bce 92.3",
    ("sv1k", "T2I R@1"): "ce 93.7, bce 94.4", ("sv1k", "I2T R@1"): "ce 94.0, bce 94.1",
    ("dci", "T2I R@1"): "65.1", ("dci", "I2T R@1"): "63.6",
    ("fgovd", "hard"): "ce 30.9, bce 20.1", ("fgovd", "medium"): "ce 55.4, bce 38.5",
    ("fgovd", "easy"): "ce 60.4, bce 34.2", ("fgovd", "trivial"): "ce 80.3, bce 71.3",
    ("scenes", "pointing"): "chance 25", **{("scenes", split): "chance 9.1" for split in FGOVD},
    **{("scenes", f"{way} R@{k}"): f"chance {k / 10}" for way in ("T2I", "I2T") for k in (1, 5, 10)}}


def present(root):
    """The benchmarks whose files lie under root."""
    return [bench for bench, file in FILES.items() if Path(root, file).exists()]


def checked(rows, where):
    """The rows of a reader; what is wrong with one names the file and the row."""
    number = 0
    try:
        for number, row in enumerate(rows, start=1):
            yield row
    except data.InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise data.InputError(f"{where}, row {number + 1}: {type(error).__name__}: {error}") from error
    if not number:
        raise data.InputError(f"{where}: no rows")


def pairs(rows, where):
    """(image, captions) in turn -> images, each once, texts, owner (each text's place in images)."""
    place, texts, owner = {}, [], []
    for image, captions in checked(rows, where):
        if not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
            raise data.InputError(f"{where}: no caption, or an empty one, of {image}")
        owner += [place.setdefault(image, len(place))] * len(captions)
        texts += captions
    return list(place), texts, owner


def file_pairs(source, columns):
    """A file of images and captions, as training reads it -> how to get an image, and what `pairs` gives."""
    rows, image, caption = data.read_rows(source, columns, ("test", "validation", "train"))
    first = {}

    def read():
        for number, row in enumerate(rows):
            name = row[image]
            name = name if isinstance(name, str) else (name["path"], hash(name["bytes"]))
            first.setdefault(name, number)
            yield name, data.captions_of(row[caption])

    return lambda name: rows[first[name]][image], *pairs(read(), source)


@torch.inference_mode()
def evaluate(model, tokenizer, bench, root="data", columns=None):
    """A benchmark, by its name or a file of images and captions -> {metric: per cent}. Raises InputError."""
    model.eval()
    root, load = Path(root), partial(open_image, root=root)
    if bench == "scenes":
        return scenes(model, tokenizer)
    if bench in CLASSIFICATION:
        return zero_shot(model, tokenizer, CLASSIFICATION[bench][1](root))
    if bench == "fgovd":
        place, splits = {}, {}
        for split in FGOVD:
            splits[split] = [(place.setdefault(image, len(place)), box, texts)
                             for image, box, texts in checked(fgovd(root, split), root / FGOVD[split])]
        return fine_grained(model, tokenizer, load, list(place), splits)
    if bench not in RETRIEVAL:
        get, *rest = file_pairs(bench, columns)
        return retrieval(model, tokenizer, lambda name: load(get(name)), *rest)
    file, read, count = RETRIEVAL[bench]
    images, texts, owner = pairs(read(root), root / file)
    if len(images) != count and is_main():
        print(f"note: {bench} has {len(images)} images, the paper's figures are of {count}", file=sys.stderr)
    return retrieval(model, tokenizer, load, images, texts, owner)


def open_image(image, root):
    """An image's name under root, or what a column of images holds -> PIL image."""
    try:
        return data.rgb(data.open_image(image, root))
    except data.UNREADABLE as error:
        name = image["path"] if isinstance(image, dict) else image
        raise data.InputError(f"{name} under {root}: unreadable image ({error})") from error


HEADER = f"{'bench':<12}{'metric':<10}{'score %':>8}  chance, or the paper's %"


def table(results):
    """{bench: {metric: per cent}} -> aligned lines, with chance or the paper's figures beside ours."""
    lines = [f"{Path(bench).name:<11} {metric:<10}{score:>8.1f}  {PUBLISHED.get((bench, metric), '')}"
             for bench, scores in results.items() for metric, score in scores.items()]
    return "\n".join(line.rstrip() for line in lines)


# --------------------------------------------------------------------------------------------- heatmaps

HEAT = np.array([(255, 235, 120), (255, 170, 40), (230, 40, 20)])  # from pale to hot
TILE, LABEL = 320, 90  # pixels: a tile's width, the height of the label below it


@torch.inference_mode()
def heatmaps(model, tokenizer, image, queries):
    """{kind: maps [Q, side, side]} of an image: patches' cosines with each query, the pooler's attention."""
    pixels = data.to_pixels(image, model.image_size, whole=True)[None].to(model.device)
    patches = F.normalize(model.encode_image(data.normalize(pixels))[1], dim=-1)      # [1, P, D]
    texts = embed_texts(model, tokenizer, queries)[None]                              # [1, Q, D]
    maps = {"cosine of patches": texts @ patches.transpose(1, 2)}                     # [1, Q, P]
    if model.has_trained_pooler:
        maps["attention of the pooler"] = model.pooler.attn(texts, patches, patches)[1]
    side = int(patches.shape[1] ** 0.5)
    return {kind: heat[0].unflatten(1, (side, side)).cpu().numpy() for kind, heat in maps.items()}


def tile(image, label, heat=None):
    """An image, or a map [side, side] over it in pale grey, with a label -> uint8 [h, w, 3]."""
    height = min(max(1, round(TILE * image.height / image.width)), 4 * TILE)
    image = image.resize((TILE, height), Image.Resampling.BICUBIC)
    if heat is not None:
        label += f"\n{heat.min():.4f} to {heat.max():.4f}"
        heat = Image.fromarray((heat - heat.min()) / max(np.ptp(heat), 1e-9))
        heat = np.asarray(heat.resize(image.size, Image.Resampling.BICUBIC)).clip(0, 1)            # [h, w]
        colours = np.stack([np.interp(heat, np.linspace(0, 1, 3), HEAT[:, c]) for c in range(3)], axis=-1)
        grey = 90 + np.asarray(image.convert("L"))[:, :, None] * 0.6
        image = Image.fromarray((grey + (colours - grey) * 0.8 * heat[:, :, None]).astype(np.uint8))
    sheet = Image.new("RGB", (TILE + 12, height + LABEL), "white")
    sheet.paste(image, (6, 6))
    lines = [line for part in label.split("\n") for line in textwrap.wrap(part, 38)[:2]]
    font = ImageFont.load_default(16)
    ImageDraw.Draw(sheet).multiline_text((6, height + 12), "\n".join(lines), "black", font)
    return np.asarray(sheet)


# ------------------------------------------------------------------------------------------------- main

def own_device():
    """This process's GPU, by LOCAL_RANK, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans attention anew for each shape, and shapes vary
    return device


def init_processes():
    """Join the processes that torchrun started, if it did -> this process's device."""
    device = own_device()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        # gloo beside nccl: what the hosts tell each other does not wait for the GPUs
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    return device


def load(source, size=None):
    """A model and its tokenizer. Raises InputError."""
    try:
        model = models.load(source, size=size)
        return model, models.load_tokenizer(source, model)
    except Exception as error:  # those of torch, transformers and safetensors have no ancestor in common
        raise data.InputError(f"{source}: {error}") from error


@data.user_errors()
def main(argv=None):
    parser = data.argument_parser(__doc__)
    add = parser.add_argument
    add("--bench", nargs="+", default=["scenes"], metavar="NAME", help="all, or of: scenes, fgovd, "
        f"{', '.join(RETRIEVAL | CLASSIFICATION)}; or a file of images and captions, as train.py's --data")
    add("--ckpt", nargs="+", help="a run's folder (default: the latest under runs/), an authors' .pt, or a "
        "Hugging Face CLIP; --heatmap takes several")
    add("--root", default="data", help="where the benchmarks lie, and the images of a file")
    add("--columns", type=data.column_names, metavar="IMAGE,CAPTION", help="of a file")
    add("--size", type=int, help="pixels of an image's side, where not the model's own")
    add("--json", help="write the scores here too")
    add("--heatmap", nargs="+", metavar=("IMAGE", "QUERY"), help="draw where each query is in an image: "
        "a file, or scene:40, a test scene")
    add("--out", default="heat.png", help="where --heatmap draws")
    args = parser.parse_args(argv)
    device = init_processes()
    runs = sorted(Path("runs").glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
    if not args.ckpt and not runs:
        raise data.InputError("no run under runs/: train one, `torchrun train.py --beta 0.5`, or pass --ckpt")
    sources = args.ckpt or [runs[-1].parent]

    if args.heatmap:
        name, *queries = args.heatmap
        if not queries:
            raise data.InputError(f"--heatmap {name}: needs at least one query")
        index = name.removeprefix("scene:")
        image = (data.draw(data.scene("test", int(index))) if index.isdigit()
                 else open_image({"bytes": None, "path": name}, root="."))
        rows = []
        for source in sources:
            model, tokenizer = load(source, args.size)
            for kind, maps in heatmaps(model.to(device), tokenizer, image, queries).items():
                tiles = [tile(image, query, heat) for query, heat in zip(queries, maps)]
                rows.append(np.hstack([tile(image, f"{source}\n{kind}"), *tiles]))
        try:
            Image.fromarray(np.vstack(rows)).save(args.out)
        except ValueError as error:  # of PIL, where the name does not say what to write
            raise data.InputError(f"--out {args.out}: {error}") from error
        print(args.out)
        return

    model, tokenizer = load(sources[0], args.size)
    model.to(device)
    if is_main():
        print(f"{sources[0]}{' (77 text positions, stretched to 248)' if model.stretched else ''}\n{HEADER}")
    results = {}
    for bench in ["scenes", *present(args.root)] if "all" in args.bench else args.bench:
        results[bench] = evaluate(model, tokenizer, bench, args.root, args.columns)
        if is_main():
            print(table({bench: results[bench]}), flush=True)
            if args.json:
                Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
    if "all" in args.bench and is_main():
        missing = [f"{bench} ({file})" for bench, file in FILES.items() if bench not in results]
        print(f"not there: {', '.join(missing)}")


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
