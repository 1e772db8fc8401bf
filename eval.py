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
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.datasets
from PIL import Image, ImageDraw, ImageFont
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.ops import roi_align
from tqdm import tqdm

import data
import model as models

BATCH = 256                      # images, or texts, encoded at a time
TIMEOUT = timedelta(minutes=30)  # of collectives
TEMPLATES = ("a photo of a {}.", "a photo of the {}.", "a close-up photo of a {}.", "a photo of a small {}.",
             "a photo of a large {}.")  # prompts of a class name, whose mean stands for the class

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

def hit(scores):
    """scores [E] of a box with its expressions, the positive first -> bool. A tie is a hit, NaN a miss."""
    return scores[0] >= scores[1:].max()

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

# -------------------------------------------------------------------------------------------- processes
def init_processes():
    """Join the processes that torchrun started, if it did -> this process's device, a GPU or the CPU."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans attention anew for each shape, and they vary
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        # gloo beside nccl: what the hosts tell each other does not wait for the GPUs
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    return device

def rank_and_world():
    """This process's rank, and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

def is_main():
    """Whether this process is the one that prints and writes."""
    return rank_and_world()[0] == 0

def shards(count):
    """The part of range(count) that this process works on, in batches."""
    rank, world = rank_and_world()
    own = range(rank, count, world)
    return [own[start:start + BATCH] for start in range(0, len(own), BATCH)]

def sum_over_ranks(rows):
    """Rows that are zero but for this process's shard -> the rows of all processes, on each of them."""
    if dist.is_initialized():
        dist.all_reduce(rows)
    return rows

# --------------------------------------------------------------------------------------------- encoding
def embed_texts(model, tokenizer, texts):
    """Texts (list of N str) -> [N, D], normalised. Each distinct text is encoded once."""
    distinct = sorted(set(texts), key=lambda text: (len(text), text))
    rows = torch.zeros(len(distinct), model.dim, device=model.clip.device)
    for part in shards(len(distinct)):
        ids = data.tokenize(tokenizer, [distinct[i] for i in part], [model.context] * len(part))
        rows[part] = model.encode_text(models.pack(ids).to(model.clip.device))
    number = {text: i for i, text in enumerate(distinct)}
    return F.normalize(sum_over_ranks(rows), dim=-1)[[number[text] for text in texts]]

def encode_images(model, load, items, whole=False):
    """Encode this process's shard of `items`; threads read ahead. `load(item)` -> PIL image.

    Yields positions in `items` (list of b), their sizes in pixels [b, 2], cls [b, D], patches [b, P, D].
    """
    def read(position):
        image = load(items[position])
        return image.size, data.to_pixels(image, model.image_size, whole)

    parts = shards(len(items))
    with ThreadPoolExecutor() as pool:
        ahead = [pool.map(read, part) for part in parts[:1]]
        for number, part in enumerate(tqdm(parts, desc="images", disable=len(parts) < 8 or not is_main())):
            sizes, pixels = zip(*ahead.pop())
            ahead += [pool.map(read, part) for part in parts[number + 1:number + 2]]
            pixels = data.normalize(torch.stack(pixels).to(model.clip.device))
            yield list(part), torch.tensor(sizes, device=model.clip.device), *model.encode_image(pixels)

def embed_images(model, load, items):
    """The CLS of images -> [I, D], normalised."""
    images = torch.zeros(len(items), model.dim, device=model.clip.device)
    for part, _, cls, _ in encode_images(model, load, items):
        images[part] = F.normalize(cls, dim=-1)
    return sum_over_ranks(images)

# -------------------------------------------------------------------------------------------- protocols
def retrieval(model, tokenizer, load, items, texts, owner):
    """R@k over a whole set, CLS against EOS. owner (list): each text's place in `items`."""
    similarity = embed_texts(model, tokenizer, texts) @ embed_images(model, load, items).T   # [T, I]
    return recall(similarity, torch.tensor(owner, device=model.clip.device))

def fine_grained(model, tokenizer, load, items, splits):
    """FG-OVD: each image and each expression is encoded once for all splits -> {split: accuracy in per cent}.

    splits: {split: [(place in items, box (x, y, w, h) in pixels, [positive, *negatives])]}
    """
    rows, device = [row for split in splits.values() for row in split], model.clip.device
    boxes = torch.tensor([box for _, box, _ in rows], dtype=torch.float, device=device)           # [R, 4]
    regions = torch.zeros(len(rows), model.dim, device=device)
    for part, sizes, _, patches in encode_images(model, load, items, whole=True):
        number = {place: i for i, place in enumerate(part)}
        own = [i for i, (place, _, _) in enumerate(rows) if place in number]
        image = torch.tensor([number[rows[i][0]] for i in own], device=device)
        regions[own] = box_embeddings(patches, boxes[own] / sizes[image].repeat(1, 2), image)
    regions = sum_over_ranks(regions)                                                 # [R, D]
    for i in (regions.norm(dim=1) == 0).nonzero()[:1, 0].tolist():  # which would tie, and so hit
        raise data.InputError(f"{items[rows[i][0]]}: box {rows[i][1]} lies outside of the image")

    texts = embed_texts(model, tokenizer, [text for _, _, texts in rows for text in texts])
    texts = texts.split([len(texts) for _, _, texts in rows])                         # R x [E, D]
    hits = torch.stack([hit(t @ region) for t, region in zip(texts, regions)]).double()
    hits = hits.split([len(split) for split in splits.values()])
    return {split: 100 * part.mean().item() for split, part in zip(splits, hits)}

def pointing(model, tokenizer, images, descriptions):
    """How often a description is most similar, in the mean, to the patches of its own quarter, in per cent.

    descriptions: of the four quarters of each image, in the order of data.PLACES, one flat list
    """
    texts = embed_texts(model, tokenizer, descriptions).unflatten(0, (-1, 4))         # [I, 4, D]
    found = torch.zeros(len(images), device=model.clip.device)
    for part, _, _, patches in encode_images(model, data.paint, images):
        heat = texts[part] @ F.normalize(patches, dim=-1).transpose(1, 2)             # [b, 4, P]
        half = int(heat.shape[2] ** 0.5) // 2
        quarters = F.avg_pool2d(heat.unflatten(2, (2 * half, 2 * half)), half).flatten(2)         # [b, 4, 4]
        found[part] = (quarters.argmax(2) == torch.arange(4, device=heat.device)).float().mean(1)
    return 100 * sum_over_ranks(found).mean().item()

def zero_shot(model, tokenizer, dataset):
    """Classification of a torchvision data set by the mean of prompts of the class names -> top-1, top-5."""
    names = [(name if isinstance(name, str) else name[0]).replace("_", " ") for name in dataset.classes]
    prompts = embed_texts(model, tokenizer, [prompt.format(name) for name in names for prompt in TEMPLATES])
    prompts = F.normalize(prompts.unflatten(0, (len(names), -1)).mean(1), dim=-1)     # [C, D]
    label = np.zeros(len(dataset), dtype=np.int64)

    def load(item):
        image, label[item] = dataset[item]
        return image

    scores = embed_images(model, load, range(len(dataset))) @ prompts.T               # [I, C]
    own = scores.gather(1, sum_over_ranks(torch.from_numpy(label)).to(model.clip.device)[:, None])
    rank = (~(scores < own)).sum(1) - 1                                               # ties count against
    return {f"top-{k}": 100 * (rank < k).double().mean().item() for k in (1, 5)}

def scenes(model, tokenizer, split="test"):
    """The built-in benchmark: FG-OVD's protocol and `pointing` on the original scenes, retrieval on all."""
    every = [data.scene(split, index) for index in range(data.SPLITS[split])]
    rows, originals = data.scene_boxes(split), every[::data.SIBLINGS]
    levels = {level: [(row["image"], row["box"], row[level]) for row in rows] for level in FGOVD}
    scores = fine_grained(model, tokenizer, data.paint, originals, levels)
    scores["pointing"] = pointing(model, tokenizer, originals, [row["hard"][0] for row in rows])
    captions = [". ".join(data.describe(scene)[0]) for scene in every]
    return scores | retrieval(model, tokenizer, data.paint, every, captions, range(len(every)))

# ------------------------------------- readers: each yields (image, captions), an image by its name in root
def urban1k(root):
    if not (root / "Urban1k").exists():
        try:
            if is_main():
                download_and_extract_archive(URBAN1K, root)
        except OSError as error:
            raise data.InputError(f"{URBAN1K} cannot be fetched ({error}): unpack it in {root}") from error
        sum_over_ranks(torch.zeros(1))  # the others wait
    for path in sorted(root.glob("Urban1k/image/*.jpg"), key=lambda path: (len(path.stem), path.stem)):
        caption = root / f"Urban1k/caption/{path.stem}.txt"
        yield f"Urban1k/image/{path.name}", caption.read_text("utf-8-sig").splitlines()[:1]

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

def file(source, columns):
    rows, image, caption = data.read_rows(source, columns, ("test", "validation", "train"))
    for row in rows:
        yield row[image], data.captions_of(row[caption])

def fgovd(root, split):
    """Yields (image, box, [positive, *negatives])."""
    for line in (root / FGOVD[split]).read_text().splitlines():
        row = json.loads(line)
        x, y, w, h = map(float, row["bbox"])
        expressions = row["pos_expression"][:1] + row["neg_expression"]
        if min(w, h) <= 0 or len(expressions) < 2 or not all(isinstance(text, str) for text in expressions):
            raise ValueError("needs a bbox of positive size, a pos_expression and a neg_expression")
        yield row["img_path"], (x, y, w, h), expressions

# ------------------------------------------------------------------------------------------- benchmarks
URBAN1K = "https://huggingface.co/datasets/BeichenZhang/Urban1k/resolve/main/Urban1k.zip"
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
FILES = {bench: name for bench, (name, *_) in (RETRIEVAL | CLASSIFICATION).items()} | {"fgovd": FGOVD["hard"]}
PUBLISHED = {  # the paper's figures of ViT-B/16, β = 0.5, K = 36; of the scenes, chance
    "urban1k": {"T2I R@1": "ce 89.0, bce 91.8", "I2T R@1": "ce 88.6, bce 92.3"},
    "sv1k": {"T2I R@1": "ce 93.7, bce 94.4", "I2T R@1": "ce 94.0, bce 94.1"},
    "dci": {"T2I R@1": "65.1", "I2T R@1": "63.6"},
    "fgovd": {"hard": "ce 30.9, bce 20.1", "medium": "ce 55.4, bce 38.5",
              "easy": "ce 60.4, bce 34.2", "trivial": "ce 80.3, bce 71.3"},
    "scenes": dict.fromkeys(FGOVD, "chance 9.1") | {"pointing": "chance 25"},
}
HEADER = f"{'bench':<12}{'metric':<10}{'score %':>8}  chance, or the paper's %"

def present(root):
    """The benchmarks whose files lie under root."""
    return [bench for bench, name in FILES.items() if Path(root, name).exists()]

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
    images, texts, owner = {}, [], []
    for image, captions in checked(rows, where):
        if not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
            raise data.InputError(f"{where}: no caption, or an empty one, of {image}"[:300])
        key = image if isinstance(image, str) else (image["path"], image["bytes"])
        owner += [images.setdefault(key, (len(images), image))[0]] * len(captions)
        texts += captions
    return [image for _, image in images.values()], texts, owner

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
        return retrieval(model, tokenizer, load, *pairs(file(bench, columns), bench))
    name, read, count = RETRIEVAL[bench]
    images, texts, owner = pairs(read(root), root / name)
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

def table(results):
    """{bench: {metric: per cent}} -> aligned lines, with chance or the paper's figures beside ours."""
    lines = [f"{Path(bench).name:<11} {metric:<10}{score:>8.1f}  {PUBLISHED.get(bench, {}).get(metric, '')}"
             for bench, scores in results.items() for metric, score in scores.items()]
    return "\n".join(line.rstrip() for line in lines)

# --------------------------------------------------------------------------------------------- heatmaps
TILE, LABEL = 320, 90  # pixels: a tile's side, the height of the label below it

@torch.inference_mode()
def heatmaps(model, tokenizer, image, queries):
    """{kind: maps [Q, side, side]} of an image: patches' cosines with each query, the pooler's attention."""
    pixels = data.to_pixels(image, model.image_size, whole=True)[None].to(model.clip.device)
    patches = F.normalize(model.encode_image(data.normalize(pixels))[1], dim=-1)      # [1, P, D]
    texts = embed_texts(model, tokenizer, queries)[None]                              # [1, Q, D]
    maps = {"cosine of patches": texts @ patches.transpose(1, 2)}                     # [1, Q, P]
    if model.has_trained_pooler:
        maps["attention of the pooler"] = model.pooler.attn(texts, patches, patches)[1]
    side = int(patches.shape[1] ** 0.5)
    return {kind: heat[0].unflatten(1, (side, side)).cpu().numpy() for kind, heat in maps.items()}

def tile(image, label, heat=None):
    """An image, or a map [side, side] in red over it in grey, with a label below -> uint8 [h, w, 3]."""
    image = image.resize((TILE, TILE), Image.Resampling.BICUBIC)
    if heat is not None:
        label += f"\n{heat.min():.4f} to {heat.max():.4f}"
        heat = Image.fromarray(230 * (heat - heat.min()) / max(np.ptp(heat), 1e-9))
        heat = heat.resize(image.size, Image.Resampling.BICUBIC).convert("L")
        grey = image.convert("L").point(lambda value: 90 + 0.6 * value).convert("RGB")
        image = Image.composite(Image.new("RGB", image.size, (225, 30, 20)), grey, heat)
    sheet = Image.new("RGB", (TILE + 12, TILE + LABEL), "white")
    sheet.paste(image, (6, 6))
    lines = [line for part in label.split("\n") for line in textwrap.wrap(part, 38)[:2]]
    font = ImageFont.load_default(16)
    ImageDraw.Draw(sheet).multiline_text((6, TILE + 12), "\n".join(lines), "black", font)
    return np.asarray(sheet)

def draw_heatmaps(loaded, name, queries):
    """loaded: {source: (model, tokenizer)}; name: an image's, or scene:40 -> a row per model and kind."""
    index = name.removeprefix("scene:")
    image = (data.paint(data.scene("test", int(index))) if index.isdigit()
             else open_image({"bytes": None, "path": name}, root="."))
    rows = []
    for source, (model, tokenizer) in loaded.items():
        for kind, maps in heatmaps(model, tokenizer, image, queries).items():
            tiles = [tile(image, query, heat) for query, heat in zip(queries, maps)]
            rows.append(np.hstack([tile(image, f"{source}\n{kind}"), *tiles]))
    return Image.fromarray(np.vstack(rows))

# ------------------------------------------------------------------------------------------------- main
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
    add("--columns", metavar="IMAGE,CAPTION", help="of a file")
    add("--size", type=int, help="pixels of an image's side, where not the model's own")
    add("--json", help="write the scores here too")
    add("--heatmap", nargs="+", metavar=("IMAGE", "QUERY"), help="draw where each query is in an image: "
        "a file, or scene:40, a test scene")
    add("--out", default="heat.png", help="where --heatmap draws")
    args = parser.parse_args(argv)
    device = init_processes()
    runs = sorted(Path("runs").glob("*/hf"), key=lambda path: path.stat().st_mtime)
    if not args.ckpt and not runs:
        raise data.InputError("no run under runs/: train one, `torchrun train.py --beta 0.5`, or pass --ckpt")
    sources = args.ckpt or [runs[-1].parent]

    if args.heatmap:
        name, *queries = args.heatmap
        if not queries or Path(args.out).suffix not in Image.registered_extensions():
            raise data.InputError(f"--heatmap {name} --out {args.out}: needs a query, and a picture's name")
        draw_heatmaps({source: load(source, args.size) for source in sources}, name, queries).save(args.out)
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
        missing = [f"{bench} ({name})" for bench, name in FILES.items() if bench not in results]
        print(f"not there: {', '.join(missing)}")

if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
