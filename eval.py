"""Evaluate a β-CLIP: retrieval with CLS against EOS, fine-grained discrimination with patches (SPEC §7).

    python eval.py --bench scenes                                  # the latest run under runs/
    python eval.py --bench urban1k fgovd --root DATA --ckpt RUN --json scores.json
    python eval.py --bench all --root DATA                         # what is there; what is not is listed
    torchrun --nproc_per_node 8 eval.py --bench coco --root DATA   # each sample once, whatever the number of processes
    python eval.py --heatmap IMAGE "a red star" "a blue circle" --out heat.png

--ckpt takes a run's folder, an authors' .pt, or a Hugging Face CLIP (hub name or folder).
"""

import argparse
import contextlib
import inspect
import json
import os
import shutil
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from filelock import FileLock
from PIL import Image, ImageDraw, ImageFont
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import roi_align
from tqdm import tqdm

import data
import model as models

LEVELS = ("hard", "medium", "easy", "trivial")
BATCH = 256  # images, or texts, encoded at a time
TEMPLATES = ("a photo of a {}.", "a photo of the {}.", "a close-up photo of a {}.", "a photo of a small {}.", "a photo of a large {}.")


# -------------------------------------------------------------------------------------------- metrics

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


# ------------------------------------------------------------------------------------------- encoding

def first():
    """Whether this process is the one that prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def share(count):
    """The part of range(count) that this process works on."""
    return range(dist.get_rank(), count, dist.get_world_size()) if dist.is_initialized() else range(count)


def joined(rows):
    """Rows that are zero but for this process's share -> all processes' rows, on every one."""
    if dist.is_initialized():
        dist.all_reduce(rows)
    return rows


def embed_texts(model, tokenizer, texts):
    """Texts (list of N str) -> [N, D], normalised. Equal ones are encoded once, ones of like length together."""
    place = {text: row for row, text in enumerate(sorted(set(texts), key=lambda text: (len(text), text)))}
    unique, rows = list(place), torch.zeros(len(place), model.dim, device=model.device)
    mine = share(len(unique))
    for at in range(0, len(mine), BATCH):
        part = mine[at:at + BATCH]
        rows[part] = model.encode_text(data.tokenize(tokenizer, [unique[row] for row in part], [model.context] * len(part))).float()
    return F.normalize(joined(rows), dim=-1)[[place[text] for text in texts]]


def encode_images(model, load, items, whole=False):
    """This process's share of `items`, `load(item)` -> PIL image, read ahead by threads, each encoded once.

    Yields positions in `items` (list of b), their sizes in pixels [b, 2], cls [b, D], patches [b, P, D].
    """
    def read(item):
        image = load(item)
        return image.size, data.to_pixels(image, model.image_size, whole)

    mine = share(len(items))
    parts = [list(mine[at:at + BATCH]) for at in range(0, len(mine), BATCH)]
    with ThreadPoolExecutor(min(16, os.cpu_count())) as pool:
        ahead = [[pool.submit(read, items[i]) for i in part] for part in parts[:1]]
        for number, part in enumerate(tqdm(parts, desc="images", disable=len(parts) < 8 or mine.start > 0)):
            jobs = ahead.pop()
            ahead += [[pool.submit(read, items[i]) for i in part] for part in parts[number + 1:number + 2]]
            try:
                sizes, pixels = zip(*(job.result() for job in jobs))
            except data.UNREADABLE as error:
                data.fail(error)
            yield part, torch.tensor(sizes, device=model.device), *model.encode_image(torch.stack(pixels).to(model.device))


# ------------------------------------------------------------------------------------------ protocols

def pooled_similarity(model, texts, patches):
    """texts [T, D], patches [b, P, D] -> [b, T]: each image pooled by each text, against that text, in tiles."""
    def one(image, tile):
        pooled = model.pooler(tile, torch.zeros(len(tile), dtype=torch.long), image[None])  # [t, D]
        return (F.normalize(pooled, dim=-1) * tile).sum(1)

    return torch.stack([torch.cat([one(image, tile) for tile in texts.split(BATCH)]) for image in patches])


def retrieval(model, tokenizer, load, items, texts, owner, score="cls"):
    """R@k over the whole set; `owner` (list): each text's place in `items`. `score`: cls, or pooled by the text."""
    texts = embed_texts(model, tokenizer, texts)                                          # [T, D]
    rows = torch.zeros(len(items), len(texts) if score == "pooled" else model.dim, device=model.device)
    for at, _, cls, patches in encode_images(model, load, items):
        rows[at] = pooled_similarity(model, texts, patches) if score == "pooled" else F.normalize(cls, dim=-1)
    rows = joined(rows)
    return recall(rows.T if score == "pooled" else texts @ rows.T, torch.tensor(owner, device=model.device))


def fine_grained(model, tokenizer, load, items, splits):
    """FG-OVD: splits {name: [(place in items, box (x, y, w, h) in pixels, [positive, *negatives])]} -> {name: accuracy}.

    Each image and each expression is encoded once for all splits.
    """
    every = [row for split in splits.values() for row in split]
    boxes = torch.tensor([row[1] for row in every], dtype=torch.float32, device=model.device)  # [R, 4]
    of = {}
    for number, row in enumerate(every):
        of.setdefault(row[0], []).append(number)
    regions = torch.zeros(len(every), model.dim, device=model.device)
    for at, sizes, _, patches in encode_images(model, load, items, whole=True):
        rows = [number for i in at for number in of[i]]
        image = torch.tensor([k for k, i in enumerate(at) for _ in of[i]], device=model.device)
        parts = boxes[rows] / sizes[image].repeat(1, 2)
        first, last = parts[:, :2], parts[:, :2] + parts[:, 2:]
        # RoIAlign would make zeros of a box outside, which tie, and so hit; and work for ages on a huge one
        for row in (~((first.clamp(min=0) < last.clamp(max=1)) & (first >= -1) & (last <= 2)).all(1)).nonzero()[:1, 0].tolist():
            data.fail(f"{items[at[image[row]]]}: the box {every[rows[row]][1]} lies outside of the image, or reaches far out of it")
        regions[rows] = box_embeddings(patches, parts, image)
    regions = joined(regions)                                                                  # [R, D]
    place = {}
    which = [torch.tensor([place.setdefault(text, len(place)) for text in row[2]]) for row in every]
    which = pad_sequence(which, batch_first=True, padding_value=-1).to(model.device)           # [R, E]
    expressions = embed_texts(model, tokenizer, list(place))
    scores = torch.cat([(expressions[w] @ r[:, :, None]).squeeze(2) for w, r in zip(which.split(BATCH), regions.split(BATCH))])
    good = hits(scores.masked_fill(which < 0, -torch.inf)).double().split([len(split) for split in splits.values()])
    return {name: 100 * part.mean().item() for name, part in zip(splits, good)}


def zero_shot(model, tokenizer, dataset):
    """Classification with prompts of the class names, TEMPLATES averaged, on a torchvision data set -> top-1, top-5."""
    names = [(name if isinstance(name, str) else name[0]).replace("_", " ") for name in getattr(dataset, "classes", None) or dataset.categories]
    prompts = embed_texts(model, tokenizer, [template.format(name) for name in names for template in TEMPLATES])
    prompts = F.normalize(prompts.unflatten(0, (len(names), -1)).mean(1), dim=-1)              # [C, D]
    label = {}

    def load(item):
        image, label[item] = dataset[item]
        return image

    ranks = torch.zeros(len(dataset), device=model.device)
    for at, _, cls, _ in encode_images(model, load, range(len(dataset))):
        scores = F.normalize(cls, dim=-1) @ prompts.T                                          # [b, C]
        own = scores.gather(1, torch.tensor([[label[i]] for i in at], device=model.device))
        ranks[at] = ((~(scores < own)).sum(1) - 1).float()                                     # ties count against, as in recall
    ranks = joined(ranks)
    return {f"top-{k}": 100 * (ranks < k).double().mean().item() for k in (1, 5)}


# ----------------------------------------------------------------------------------------- benchmarks

class Missing(Exception):
    """A benchmark's data are not there."""


def find(root, *names):
    """The first of some files or folders under root that is there."""
    for name in names:
        if (Path(root) / name).exists():
            return Path(root) / name
    raise Missing(f"there is no {' or '.join(names)} under {root}")


def picture(root, folders, name, where):
    """The path of image `name`, in the first of `folders` under root that has it."""
    paths = [data.inside(Path(root) / folder, name, where) for folder in folders]
    for path in paths:
        if os.path.isfile(path):
            return path
    raise Missing(f"{where}: there is no image {paths[0]}")


def open_image(path):
    """The image as RGB. OSError, which names it, where it is unreadable."""
    try:
        with Image.open(path) as image:
            return data.rgb(image)
    except data.UNREADABLE as error:
        raise OSError(f"{path}: unreadable image ({error})") from error


def scenes(model, tokenizer, score):
    """The built-in benchmark: retrieval over all test scenes, FG-OVD's protocol on the objects of the originals."""
    drawn = [data.scene("test", index) for index in range(data.SPLITS["test"])]
    captions = [". ".join(data.describe(one)[0]) for one in drawn]
    rows = data.scene_boxes()
    splits = {level: [(row["image"] // data.SIBLINGS, row["box"], row[level]) for row in rows] for level in LEVELS}
    return (fine_grained(model, tokenizer, data.draw, drawn[::data.SIBLINGS], splits)
            | retrieval(model, tokenizer, data.draw, drawn, captions, list(range(len(drawn))), score))


# Each of these gives rows (where, path of an image, its captions).

def urban1k(root, download):
    folder = Path(root) / "Urban1k"
    if download and not folder.exists():
        fetch_urban1k(root)
    images = sorted(find(root, "Urban1k/image").glob("*.jpg"), key=lambda path: (len(path.stem), path.stem))
    for path in images:
        text = folder / "caption" / f"{path.stem}.txt"
        try:
            yield text, path, text.read_text("utf-8-sig").splitlines()[:1]
        except (OSError, UnicodeDecodeError) as error:
            data.fail(f"{text}: {error}")


def fetch_urban1k(root):
    from huggingface_hub import hf_hub_download
    Path(root).mkdir(parents=True, exist_ok=True)
    with FileLock(Path(root) / ".urban1k.lock"):
        if (Path(root) / "Urban1k").exists():  # another process was first
            return
        try:
            archive = hf_hub_download("BeichenZhang/Urban1k", "Urban1k.zip", repo_type="dataset")
        except Exception as error:
            raise Missing(f"there is no {root}/Urban1k, and the hub cannot be reached: unpack Urban1k.zip of "
                          f"https://huggingface.co/datasets/BeichenZhang/Urban1k there, as {root}/Urban1k/image and …/caption") from error
        beside = Path(root) / ".urban1k.tmp"
        zipfile.ZipFile(archive).extractall(beside)
        os.rename(beside / "Urban1k", Path(root) / "Urban1k")  # whole, or not at all
        shutil.rmtree(beside)


def sv1k(root):
    path = find(root, data.SHAREGPT4V)
    for number, row in enumerate(data.annotations(path, held_out=True), start=1):
        where = f"{path}, row {number}"
        yield where, picture(root, [""], row["image"], where), [data.clean(row["caption"])]


def dci(root, caption):
    home = find(root, "densely_captioned_images")
    splits = home / "splits.json"
    names = [path.name for path in (home / "annotations").glob("*.json")]
    if splits.is_file():
        where, row = next(data.rows(splits))
        names = [name if isinstance(name, str) else data.fail(f"{where}: {name!r} is no file's name")
                 for split in row for name in data.field(row, split, where, list)]
    for name in sorted(names):
        where, row = next(data.rows(data.inside(home / "annotations", name.removesuffix(".json") + ".json", splits)))
        text = data.field(row, "extra_caption", where)
        if caption == "short+extra":
            text = data.field(row, "short_caption", where) + "\n" + text
        yield where, picture(home, ["photos"], data.field(row, "image", where), where), [text]


def coco(root):
    path = find(root, *(f"{folder}captions_val2017.json" for folder in ("", "annotations/", "coco/", "coco/annotations/")))
    _, whole = next(data.rows(path))
    captions = {}
    for where, row in data.objects(whole, "annotations", path):
        captions.setdefault(data.field(row, "image_id", where, int), []).append(data.field(row, "caption", where))
    for where, row in data.objects(whole, "images", path):
        yield where, picture(root, ["val2017", "coco/val2017"], data.field(row, "file_name", where), where), captions.get(data.field(row, "id", where, int))


def flickr30k(root):
    names = ("dataset_flickr30k.json", "flickr30k_test.json", "flickr30k_test.jsonl")
    path = find(root, *names, *(f"flickr30k/{name}" for name in names))
    folders = [f"{at}{name}" for at in ("", "flickr30k/") for name in ("flickr30k-images", "images", "")]
    for where, row in data.rows(path):
        if "images" in row:  # Karpathy's file is one object
            parts = [(where, data.field(one, "filename", where), [data.field(text, "raw", place) for place, text in data.objects(one, "sentences", where)])
                     for where, one in data.objects(row, "images", path) if one.get("split") == "test"]
        else:
            parts = [(where, data.field(row, "image", where), data.field(row, "caption", where, list))]
        for where, name, captions in parts:
            yield where, picture(root, folders, name, where), captions


RETRIEVAL = {"urban1k": 1000, "sv1k": 1000, "dci": 7805, "coco": 5000, "flickr30k": 1000}  # images
FGOVD = {"hard": ("h_attributes_llava.jsonl", "1_attributes.json"), "medium": ("m_attributes_llava.jsonl", "2_attributes.json"),
         "easy": ("e_attributes_llava.jsonl", "3_attributes.json"), "trivial": ("shuffle_negatives_llava.jsonl", "shuffle_negatives.json")}


def pairs(name, rows):
    """Rows (where, path, captions) -> paths, texts, owner. Every image needs a caption, every caption a word."""
    paths, texts, owner = [], [], []
    for where, path, captions in rows:
        if not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
            data.fail(f"{where}: no caption, or an empty one, of {path}")
        owner += [len(paths)] * len(captions)
        paths.append(path)
        texts += captions
    if not paths:
        raise Missing("there are no images")
    if len(paths) != RETRIEVAL[name] and first():
        print(f"note: {name} has {len(paths)} images here, the published figures are of {RETRIEVAL[name]}", file=sys.stderr)
    return paths, texts, owner


def fgovd(root):
    """FG-OVD's files, either format -> paths and the splits that `fine_grained` takes."""
    folders = [home + images for home in ("", "coco/", "fgovd/", "FG-OVD/") for images in ("", "val2017")]
    place, splits = {}, {}
    for level, names in FGOVD.items():
        file = find(root, *(folder + name for name in names for folder in ("", "fgovd/", "FG-OVD/")))
        splits[level] = []
        for where, row in data.rows(file):
            if "annotations" in row:  # the original file is one object, in COCO's style
                images = {data.field(image, "id", where, int): image.get("file_name") for where, image in data.objects(row, "images", file)}
                parts = [(where, one | {"img_path": images.get(data.field(one, "image_id", where, int))})
                         for where, one in data.objects(row, "annotations", file)]
            else:
                parts = [(where, row)]
            for where, one in parts:
                path = picture(root, folders, data.field(one, "img_path", where), where)
                positive, negative = ([x] if isinstance(x, str) else x for x in (one.get("pos_expression"), one.get("neg_expression")))
                if not all(isinstance(texts, list) and texts and all(isinstance(text, str) and text.strip() for text in texts) for texts in (positive, negative)):
                    data.fail(f"{where}: needs a pos_expression and at least one neg_expression, all texts")
                box = data.field(one, "bbox", where, list)
                if len(box) != 4 or not all(isinstance(x, (int, float)) and abs(x) < 1e9 for x in box) or min(box[2:]) <= 0:
                    data.fail(f"{where}: bbox must be x, y, w, h in pixels, is {box}")
                splits[level].append((place.setdefault(path, len(place)), box, positive[:1] + negative))
    return list(place), splits


def torchvision_set(name, root, download):
    """A torchvision data set of images with class names, by its class's name in lower case; its test (or validation) part."""
    kind = TORCHVISION[name]
    options = inspect.signature(kind).parameters
    choices = [{"train": False}] if "train" in options else [{"split": part} for part in ("test", "val")] if "split" in options else [{}]
    if download and "download" in options:  # after a look at what is there, in which nobody needs a lock
        choices += [choice | {"download": True} for choice in choices]
    home = Path(root) / "imagenet" if name == "imagenet" and (Path(root) / "imagenet").is_dir() else Path(root)
    for choice in choices:
        try:
            if "download" in choice:
                home.mkdir(parents=True, exist_ok=True)
            with FileLock(home / f".{name}.lock") if "download" in choice else contextlib.nullcontext():
                dataset = kind(home, **choice)
        except (RuntimeError, OSError, ValueError, TypeError, ImportError) as error:  # ValueError: no such split
            reason = str(error)
            continue
        if not (getattr(dataset, "classes", None) or getattr(dataset, "categories", None)):
            data.fail(f"--bench {name}: torchvision knows no class names of it")
        return dataset
    raise Missing(reason)


TORCHVISION = {name.lower(): getattr(torchvision.datasets, name) for name in torchvision.datasets.__all__}
BENCHES = ("scenes", *RETRIEVAL, "fgovd")
CLASSIFICATION = ("cifar10", "cifar100", "food101", "imagenet")  # what --bench all looks for
BESIDE = {  # what stands beside our figures: chance, or the published ones of β-CLIP ViT-B/16, β = 0.5, K = 36 (SPEC §7)
    "scenes": dict.fromkeys(LEVELS, "chance 9.1") | {f"{way} R@{k}": f"chance {k / 10}" for way in ("T2I", "I2T") for k in (1, 5, 10)},
    "urban1k": {"T2I R@1": "ce 89.0, bce 91.8", "I2T R@1": "ce 88.6, bce 92.3"},
    "sv1k": {"T2I R@1": "ce 93.7, bce 94.4", "I2T R@1": "ce 94.0, bce 94.1"},
    "dci": {"T2I R@1": "65.1", "I2T R@1": "63.6"},
    "fgovd": {"hard": "ce 30.9, bce 20.1", "medium": "ce 55.4, bce 38.5", "easy": "ce 60.4, bce 34.2", "trivial": "ce 80.3, bce 71.3"},
}


@torch.inference_mode()
def evaluate(model, tokenizer, bench, root="data", score="cls", dci_caption="extra", download=False):
    """One benchmark -> {metric: per cent}. Raises Missing where its data are not there."""
    model.eval()
    torch.set_float32_matmul_precision("highest")  # training may have lowered it
    torch.backends.cudnn.allow_tf32 = False        # of the patch embedding, which is a convolution
    if bench == "scenes":
        return scenes(model, tokenizer, score)
    if bench == "fgovd":
        paths, splits = fgovd(root)
        return fine_grained(model, tokenizer, open_image, paths, splits)
    if bench in RETRIEVAL:
        rows = {"urban1k": urban1k(root, download), "sv1k": sv1k(root), "dci": dci(root, dci_caption), "coco": coco(root),
                "flickr30k": flickr30k(root)}[bench]  # generators: only the one that is asked for does anything
        return retrieval(model, tokenizer, open_image, *pairs(bench, rows), score)
    return zero_shot(model, tokenizer, torchvision_set(bench, root, download))


def table(results):
    """{bench: {metric: per cent}} as aligned lines, chance or published figures beside ours."""
    return "\n".join(f"{bench:<12}{metric:<10}{score:>8.1f}  {BESIDE.get(bench, {}).get(metric, '')}".rstrip()
                     for bench, scores in results.items() for metric, score in scores.items())


HEADER = f"{'bench':<12}{'metric':<10}{'score %':>8}  chance, or the paper's %"


# ------------------------------------------------------------------------------------------- heatmaps

HEAT = np.array([(255, 235, 120), (255, 170, 40), (230, 40, 20)])  # from pale to hot
TILE = 320  # pixels


@torch.inference_mode()
def heatmap(model, tokenizer, image, queries):
    """One row as a PIL image: the image, then for each query the similarity of each patch with it, labelled."""
    _, patches = model.encode_image(data.to_pixels(image, model.image_size, whole=True)[None].to(model.device))
    heat = embed_texts(model, tokenizer, queries) @ F.normalize(patches[0], dim=-1).T        # [Q, P]
    side = int(heat.shape[1] ** 0.5)
    size = (TILE, min(max(1, round(TILE * image.height / image.width)), 4 * TILE))
    base, font, gap = image.resize(size, Image.Resampling.BICUBIC), ImageFont.load_default(17), 12
    grey = 90 + np.asarray(base.convert("L"))[:, :, None] * 0.6  # pale: the colours are the similarity's
    tiles = [(base, ["image"])]
    for query, row in zip(queries, heat.unflatten(1, (side, side)).cpu().numpy()):
        low, high = row.min(), row.max()
        smooth = np.asarray(Image.fromarray((row - low) / max(high - low, 1e-6)).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
        colours = np.stack([np.interp(smooth, np.linspace(0, 1, len(HEAT)), HEAT[:, c]) for c in range(3)], axis=-1)
        overlay = Image.fromarray((grey + (colours - grey) * 0.8 * smooth[:, :, None]).astype(np.uint8))
        lines = [""]
        for word in query.split():
            longer = f"{lines[-1]} {word}".strip()
            lines = [*lines[:-1], longer] if font.getlength(longer) <= TILE else [*lines, word]
        tiles.append((overlay, [*lines, f"{low:.2f} to {high:.2f}"]))
    line = 22
    sheet = Image.new("RGB", (len(tiles) * (TILE + gap) + gap, size[1] + 2 * gap + line * max(len(lines) for _, lines in tiles) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for at, (tile, lines) in enumerate(tiles):
        sheet.paste(tile, (gap + at * (TILE + gap), gap))
        for number, text in enumerate(lines):
            pen.text((gap + at * (TILE + gap) + TILE // 2, size[1] + 2 * gap + number * line), text, font=font, anchor="ma",
                     fill="gray" if at and number == len(lines) - 1 else "black")
    return sheet


def own_device():
    """This process's GPU, by LOCAL_RANK, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= torch.cuda.device_count():
        data.fail(f"process {local} of this machine has no GPU of its own, there are {torch.cuda.device_count()}: lower --nproc_per_node")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def latest_run(root="runs"):
    saved = {run: models.newest(run).stat().st_mtime for run in Path(root).glob("*") if models.newest(run).is_file()}
    if not saved:
        data.fail(f"no run under {root}/: train one with `torchrun train.py --beta 0.5`, or name one with --ckpt")
    return max(saved, key=saved.get)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = data.fail
    parser.add_argument("--bench", nargs="+", default=["scenes"], metavar="NAME",
                        help=f"{', '.join(BENCHES)}, any torchvision data set with class names ({', '.join(CLASSIFICATION)} …), or all")
    parser.add_argument("--ckpt", help="a run's folder (default: the latest under runs/), an authors' .pt, or a Hugging Face CLIP")
    parser.add_argument("--root", default="data", help="where the benchmarks lie")
    parser.add_argument("--score", choices=("cls", "pooled"), default="cls", help="retrieval: image by CLS, or pooled by each text")
    parser.add_argument("--dci-caption", choices=("extra", "short+extra"), default="extra")
    parser.add_argument("--json", help="write the scores here too")
    parser.add_argument("--heatmap", nargs="+", metavar=("IMAGE", "QUERY"), help="draw patch–text similarities instead")
    parser.add_argument("--out", default="heat.png", help="where --heatmap draws")
    args = parser.parse_args(argv)
    everything = "all" in args.bench
    benches = [*BENCHES, *CLASSIFICATION] if everything else args.bench
    for name in benches:
        if name not in BENCHES and name not in TORCHVISION:
            data.fail(f"--bench {name}: neither of {', '.join(BENCHES)}, all, nor a torchvision data set")
    for flag, path in (("--json", args.json), ("--out", args.heatmap and args.out)):
        folder = path and Path(path).absolute().parent
        if path and (not folder.is_dir() or Path(path).is_dir() or not os.access(path if os.path.exists(path) else folder, os.W_OK)):
            data.fail(f"{flag} {path}: no file can be written there")
    if args.heatmap and (len(args.heatmap) < 2 or not all(map(str.strip, args.heatmap))):
        data.fail("--heatmap: needs an image and at least one query, none of them empty")
    if Path(args.root).exists() and not Path(args.root).is_dir():
        data.fail(f"--root {args.root}: is no folder")

    device = own_device()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    source = latest_run() if args.ckpt is None else args.ckpt
    try:
        model = models.load(source)
        tokenizer = models.load_tokenizer(source, model)
    except Exception as error:  # torch's, transformers' and safetensors' have no ancestor in common
        data.fail(f"--ckpt {source}: {data.reason(error)}")
    if args.score == "pooled" and not model.pools:
        data.fail(f"--score pooled: {source} has no trained pooler")
    model = model.to(device).eval()
    if args.heatmap:
        try:
            image, *queries = args.heatmap
            heatmap(model, tokenizer, open_image(image), [query.encode(errors="replace").decode() for query in queries]).save(args.out)
        except (OSError, ValueError) as error:  # ValueError: PIL does not know what to write by the file's name
            data.fail(f"--heatmap {image} --out {args.out}: {error}")
        print(args.out)
        return
    if first():
        print(f"{source}{' (77 text positions, stretched to 248)' if model.stretched else ''}\n{HEADER}")
    results, missing = {}, []
    for name in benches:
        try:
            results[name] = evaluate(model, tokenizer, name, args.root, args.score, args.dci_caption, download=not everything)
        except Missing as reason:
            if not everything:
                data.fail(f"--bench {name}: {reason}")
            missing.append(f"not there: {name} ({reason})")
            continue
        except OSError as error:
            data.fail(f"--bench {name}: {error}")
        if first():
            print(table({name: results[name]}), flush=True)
            try:
                if args.json:
                    Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
            except OSError as error:
                data.fail(f"--json {args.json}: {error}")
    if first() and missing:
        print("\n".join(missing))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
