"""Evaluate a β-CLIP: retrieval by CLS and EOS, fine-grained discrimination by patches (paper, section 5).

    python eval.py --bench scenes                                  # the latest run under runs/
    python eval.py --bench urban1k fgovd --root DATA --ckpt RUN    # --bench all: those that are there
    python eval.py --bench pairs.jsonl --root IMAGES --ckpt RUN    # retrieval on your own images and captions
    torchrun --nproc_per_node 8 eval.py --bench coco --root DATA   # on several processes
    python eval.py --heatmap IMAGE "a red star" "a blue circle" --ckpt RUN OTHER_RUN --out heat.png
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torchvision import datasets
from torchvision.ops import box_convert, roi_align
from tqdm import tqdm

import data
import model as models

BATCH = 256  # images, or texts, encoded at a time
TEMPLATES = ("a photo of a {}.", "a photo of the {}.", "a close-up photo of a {}.", "a photo of a small {}.",
             "a photo of a large {}.")  # prompts of a class name, whose mean stands for the class

# ------------------------------------------------------------------------------ processes and encoding
def init_processes():
    """Join the processes that torchrun started, if it did -> this process's device, a GPU or the CPU."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans attention anew for each shape, and they vary
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # hosts do not wait for GPUs
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    return device

def rank_and_world():
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
    """This process's shard of `items`: places [b], sizes in pixels [b, 2], cls [b, D], patches [b, P, D]."""
    def read(position):
        image = load(items[position])
        return image.size, data.to_pixels(image, model.image_size, whole)

    parts = shards(len(items))
    with ThreadPoolExecutor() as pool:  # which reads a batch ahead
        ahead = [pool.map(read, part) for part in parts[:1]]
        for number, part in enumerate(tqdm(parts, desc="images", disable=len(parts) < 8 or not is_main())):
            sizes, pixels = zip(*ahead.pop())
            ahead += [pool.map(read, part) for part in parts[number + 1:number + 2]]
            pixels = data.normalize(torch.stack(pixels).to(model.clip.device))
            yield list(part), torch.tensor(sizes, device=pixels.device), *model.encode_image(pixels)

def embed_images(model, load, items):
    """The CLS of images -> [I, D], normalised."""
    images = torch.zeros(len(items), model.dim, device=model.clip.device)
    for part, _, cls, _ in encode_images(model, load, items):
        images[part] = F.normalize(cls, dim=-1)
    return sum_over_ranks(images)

# -------------------------------------------------------------------------------- metrics and protocols
def recall(similarity, owner, ks=(1, 5, 10)):
    """R@k in per cent. similarity [T, I]; owner [T]: each text's image. A tie, or NaN, counts against."""
    own = similarity.gather(1, owner[:, None])                                         # [T, 1]
    t2i = (~(similarity < own)).sum(1) - 1                                             # [T] rank of the image
    is_own = owner[:, None] == torch.arange(similarity.shape[1], device=owner.device)  # [T, I]
    best = similarity.masked_fill(~is_own, -torch.inf).amax(0)                         # [I] of its texts
    i2t = (~(similarity.masked_fill(is_own, -torch.inf) < best)).sum(0)                # [I] rank of a text
    return {f"{name} R@{k}": 100 * (rank < k).double().mean().item()
            for name, rank in (("T2I", t2i), ("I2T", i2t)) for k in ks}

def hit(scores):
    """scores [E] of a box with its expressions, the positive first -> bool. A tie is a hit, NaN a miss."""
    return scores[0] >= scores[1:].max()

def box_embeddings(patches, boxes, image):
    """RoIAlign of boxes [R, 4] (x, y, w, h as fractions) of images [R], patches [B, P, D] -> [R, D]."""
    side = int(patches.shape[1] ** 0.5)
    grid = patches.transpose(1, 2).unflatten(2, (side, side))                         # [B, D, side, side]
    rois = torch.cat([image[:, None], box_convert(boxes, "xywh", "xyxy") * side], 1)  # [R, 5]
    return F.normalize(roi_align(grid, rois, output_size=1, aligned=True).flatten(1), dim=-1)

def retrieval(model, tokenizer, load, items, rows):
    """R@k over a whole set, CLS against EOS. rows: [(place in items, its captions)]"""
    texts = embed_texts(model, tokenizer, [text for _, captions in rows for text in captions])    # [T, D]
    owner = torch.tensor([place for place, captions in rows for _ in captions], device=texts.device)
    return recall(texts @ embed_images(model, load, items).T, owner)

def fine_grained(model, tokenizer, load, items, splits):
    """FG-OVD. {split: [(place in items, box (x, y, w, h), [positive, *negatives])]} -> {split: per cent}."""
    places, boxes, rows = zip(*(row for split in splits.values() for row in split))
    places = torch.tensor(places, device=model.clip.device)                           # [R]
    boxes = torch.tensor(boxes, dtype=torch.float, device=places.device)              # [R, 4] in pixels
    regions = torch.zeros(len(rows), model.dim, device=places.device)
    for part, sizes, _, patches in encode_images(model, load, items, whole=True):  # once for all splits
        own, image = (places[:, None] == torch.tensor(part, device=places.device)).nonzero().T
        regions[own] = box_embeddings(patches, boxes[own] / sizes[image].repeat(1, 2), image)
    regions = sum_over_ranks(regions)                                                 # [R, D]
    for i in (regions.norm(dim=1) == 0).nonzero()[:1, 0]:  # it would tie, and so hit
        raise data.InputError(f"{items[places[i]]}: box {boxes[i].tolist()} lies outside of the image")
    texts = embed_texts(model, tokenizer, [text for row in rows for text in row])
    texts = texts.split([len(row) for row in rows])                                   # R x [E, D]
    hits = torch.stack([hit(t @ region) for t, region in zip(texts, regions)]).double()
    hits = hits.split([len(split) for split in splits.values()])
    return {split: 100 * part.mean().item() for split, part in zip(splits, hits)}

def pointing(model, tokenizer, images, descriptions):
    """How often, in per cent, a description is most similar to its own quarter's patches, in their mean."""
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
    scores = embed_images(model, lambda item: dataset[item][0], range(len(dataset))) @ prompts.T    # [I, C]
    label = dataset._labels if isinstance(dataset, datasets.Food101) else dataset.targets
    found = recall(scores, torch.tensor(label, device=scores.device), ks=(1, 5))  # a class as a text's image
    return {f"top-{k}": found[f"T2I R@{k}"] for k in (1, 5)}

def scenes(model, tokenizer, split="test"):
    """The built-in benchmark: FG-OVD's protocol and `pointing` on the original scenes, retrieval on all."""
    every = [data.scene(split, index) for index in range(data.SPLITS[split])]
    rows, originals = data.scene_boxes(split), every[::data.SIBLINGS]
    levels = {level: [(row["image"], row["box"], row[level]) for row in rows] for level in FGOVD}
    scores = fine_grained(model, tokenizer, data.paint, originals, levels)
    scores["pointing"] = pointing(model, tokenizer, originals, [row["hard"][0] for row in rows])
    captions = [(place, [". ".join(data.describe(scene)[0])]) for place, scene in enumerate(every)]
    return scores | retrieval(model, tokenizer, data.paint, every, captions)

# ------------------------------------------------------------------------------------------- benchmarks
# A reader takes a path and yields (image, captions), or (image, box, texts); an image by its name in --root.
def urban1k(folder):
    if is_main() and not folder.exists():
        try:
            datasets.utils.download_and_extract_archive(URBAN1K, folder.parent)
        except OSError as error:
            raise data.InputError(f"{URBAN1K} cannot be fetched ({error}): unpack it in {folder.parent}")
    sum_over_ranks(torch.zeros(1))  # the others wait
    for path in sorted(folder.glob("image/*.jpg")):
        caption = folder / f"caption/{path.stem}.txt"
        yield f"Urban1k/image/{path.name}", caption.read_text("utf-8-sig").splitlines()[:1]

def sv1k(path):
    for image, captions in islice(file(path), data.HELD_OUT):
        yield image, [data.clean(text) for text in captions]

def dci(folder, keys=("extra_caption",)):
    splits = json.loads((folder / "splits.json").read_text())
    for name in sorted(sum(splits.values(), [])):
        row = json.loads((folder / "annotations" / name).with_suffix(".json").read_text())
        yield f"{folder.name}/photos/{row['image']}", ["\n".join(row[key] for key in keys)]

def coco(path):
    whole, captions = json.loads(path.read_text()), {}
    for row in whole["annotations"]:
        captions.setdefault(row["image_id"], []).append(row["caption"])
    for row in whole["images"]:
        yield f"val2017/{row['file_name']}", captions[row["id"]]

def flickr30k(path):
    for row in json.loads(path.read_text())["images"]:
        if row["split"] == "test":
            yield f"flickr30k-images/{row['filename']}", [sentence["raw"] for sentence in row["sentences"]]

def file(path, columns=None):
    rows, image, caption = data.read_rows(path, columns, ("test", "validation", "train"))
    for row in rows:
        name = row[image] if isinstance(row[image], str) else tuple(row[image].items())
        yield name, data.captions_of(row[caption])

def fgovd(path):
    for row in map(json.loads, path.read_text().splitlines()):
        x, y, w, h = map(float, row["bbox"])
        if min(w, h) <= 0 or not row["neg_expression"]:
            raise ValueError("needs a bbox of positive size, and a neg_expression")
        yield row["img_path"], (x, y, w, h), row["pos_expression"][:1] + row["neg_expression"]

URBAN1K = "https://huggingface.co/datasets/BeichenZhang/Urban1k/resolve/main/Urban1k.zip"
RETRIEVAL = {  # what lies under --root, and its reader
    "urban1k": ("Urban1k", urban1k),
    "sv1k": (data.SHAREGPT4V, sv1k),
    "dci": ("densely_captioned_images", dci),
    "dci-short": ("densely_captioned_images", partial(dci, keys=("short_caption", "extra_caption"))),
    "coco": ("captions_val2017.json", coco),
    "flickr30k": ("dataset_flickr30k.json", flickr30k),
}
CLASSIFICATION = {
    "cifar10": ("cifar-10-batches-py", lambda root: datasets.CIFAR10(root, train=False, download=True)),
    "cifar100": ("cifar-100-python", lambda root: datasets.CIFAR100(root, train=False, download=True)),
    "food101": ("food-101", lambda root: datasets.Food101(root, "test", download=True)),
    "imagenet": ("imagenet", lambda root: datasets.ImageNet(root / "imagenet", "val")),
}
FGOVD = {"hard": "h_attributes_llava.jsonl", "medium": "m_attributes_llava.jsonl",
         "easy": "e_attributes_llava.jsonl", "trivial": "shuffle_negatives_llava.jsonl"}
FILES = {bench: name for bench, (name, _) in (RETRIEVAL | CLASSIFICATION).items()} | {"fgovd": FGOVD["hard"]}
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

def read_all(reader, path, images):
    """A reader's rows -> [(place of the image in `images`, a dict which grows, *box, texts)]."""
    rows = []
    try:
        for image, *box, texts in reader(path):
            if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
                raise ValueError(f"no text, or an empty one, of {image}")
            rows.append((images.setdefault(image, len(images)), *box, texts))
    except data.InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise data.InputError(f"{path}, row {len(rows) + 1}: {type(error).__name__}: {error}") from error
    if not rows:
        raise data.InputError(f"{path}: no rows")
    return rows

def open_image(image, root):
    """An image's name under root, or the items of what a column of images holds -> PIL image."""
    image = image if isinstance(image, str) else dict(image)
    try:
        return data.rgb(data.open_image(image, root))
    except data.UNREADABLE as error:
        name = image["path"] if isinstance(image, dict) else image
        raise data.InputError(f"{name} under {root}: unreadable image ({error})") from error

@torch.inference_mode()
def evaluate(model, tokenizer, bench, root="data", columns=None):
    """A benchmark, by its name or a file of images and captions -> {metric: per cent}. Raises InputError."""
    model.eval()
    root, images = Path(root), {}
    if bench == "scenes":
        return scenes(model, tokenizer)
    if bench in CLASSIFICATION:
        return zero_shot(model, tokenizer, CLASSIFICATION[bench][1](root))
    load = partial(open_image, root=root)
    if bench == "fgovd":
        splits = {split: read_all(fgovd, root / name, images) for split, name in FGOVD.items()}
        return fine_grained(model, tokenizer, load, list(images), splits)
    if bench in RETRIEVAL:
        rows = read_all(RETRIEVAL[bench][1], root / FILES[bench], images)
    else:
        rows = read_all(partial(file, columns=columns), bench, images)
    return retrieval(model, tokenizer, load, list(images), rows)

def table(results):
    """{bench: {metric: per cent}} -> aligned lines, with chance or the paper's figures beside ours."""
    lines = [f"{Path(bench).name:<11} {metric:<10}{score:>8.1f}  {PUBLISHED.get(bench, {}).get(metric, '')}"
             for bench, scores in results.items() for metric, score in scores.items()]
    return "\n".join(line.rstrip() for line in lines)

# --------------------------------------------------------------------------------------------- heatmaps
TILE, LABEL = 320, 60  # pixels: a tile's side, the height of the label below it

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
    """An image, or a map [side, side] in red over it in grey, with a label below -> PIL image."""
    image = image.resize((TILE, TILE), Image.Resampling.BICUBIC)
    if heat is not None:
        label += f"\n{heat.min():.4f} to {heat.max():.4f}"
        heat = ((heat - heat.min()) / max(np.ptp(heat), 1e-9)) ** 2  # squared, the peaks stand out
        heat = Image.fromarray(255 * heat).resize(image.size, Image.Resampling.BICUBIC).convert("L")
        grey = image.convert("L").point(lambda value: 110 + value // 2).convert("RGB")
        image = Image.composite(Image.new("RGB", image.size, "red"), grey, heat)
    sheet = ImageOps.expand(image, (6, 6, 6, LABEL - 6), "white")
    ImageDraw.Draw(sheet).text((6, TILE + 12), label, "black", font_size=14)
    return sheet

def draw_heatmaps(args, sources):
    """Draw and save what --heatmap asks for, a row per model and kind of map."""
    name, *queries = args.heatmap
    if not queries or Path(args.out).suffix not in Image.registered_extensions():
        raise data.InputError(f"--heatmap {name} --out {args.out}: needs a query, and a picture's name")
    index = name.removeprefix("scene:")
    image = data.paint(data.scene("test", int(index))) if index.isdigit() else data.rgb(Image.open(name))
    rows = []
    for source in sources:
        for kind, maps in heatmaps(*load(source, args.size), image, queries).items():
            tiles = [tile(image, query[:46], heat) for query, heat in zip(queries, maps)]
            rows.append(np.hstack([tile(image, f"{str(source)[-46:]}\n{kind}"), *tiles]))
    Image.fromarray(np.vstack(rows)).save(args.out)
    print(args.out)

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
    add("--ckpt", nargs="+", help="run's folder (default: the latest), authors' .pt, or Hugging Face CLIP")
    add("--root", default="data", help="where the benchmarks lie, and the images of a file")
    add("--columns", metavar="IMAGE,CAPTION", help="of a file")
    add("--size", type=int, help="pixels of an image's side, where not the model's own")
    add("--json", help="write the scores here too")
    add("--heatmap", nargs="+", metavar=("IMAGE", "QUERY"), help="see above; IMAGE: a file, or scene:40")
    add("--out", default="heat.png", help="where --heatmap draws")
    args = parser.parse_args(argv)
    runs = sorted(Path("runs").glob("*/hf/config.json"), key=lambda path: path.stat().st_mtime)
    if not args.ckpt and not runs:
        raise data.InputError("no run under runs/: train one, `torchrun train.py --beta 0.5`, or pass --ckpt")
    sources = args.ckpt or [runs[-1].parents[1]]
    if args.heatmap:
        return draw_heatmaps(args, sources)
    model, tokenizer = load(sources[0], args.size)
    model.to(init_processes())
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
