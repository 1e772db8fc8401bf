"""Evaluate β-CLIP: retrieval by CLS and EOS, fine-grained discrimination by patches (section 4).

    python eval.py                                                  # the latest run, on the scenes
    python eval.py --bench urban1k fgovd --root DATA --ckpt RUN openai/clip-vit-base-patch16
    python eval.py --bench all pairs.jsonl --root DATA      # scenes, all under DATA; your own pairs
"""

import argparse
import itertools
import json
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.ops import box_convert, roi_align
from tqdm import tqdm
from transformers import CLIPTokenizer

import data
from model import BetaCLIP, InputError, command_line, input_errors, load, pack

BATCH_SIZE = 256  # images, or texts, in a forward pass
CANDIDATES = 128  # in conditioned retrieval: images pooled for each text, and texts for each image
URBAN1K_URL = "https://huggingface.co/datasets/BeichenZhang/Urban1k/resolve/main/Urban1k.zip"
EVALUATION_SPLITS = ("test", "validation", "val", "valid", "dev")
FGOVD_FILES = {  # by difficulty: those of FG-CLIP, the official ones
    "hard": ("h_attributes_llava.jsonl", "1_attributes.json"),
    "medium": ("m_attributes_llava.jsonl", "2_attributes.json"),
    "easy": ("e_attributes_llava.jsonl", "3_attributes.json"),
    "trivial": ("shuffle_negatives_llava.jsonl", "shuffle_negatives.json")}
Scores = dict[str, float]  # {metric: per cent}


class Row(NamedTuple):
    """A row of a benchmark: an image and its captions; or, with a box (x, y, width, height in
    pixels) in it, descriptions of what is in the box, of which the first is right."""

    image: Any  # a file name under --root, {"bytes", "path"}, or a PIL image; later an index
    texts: list[str]
    box: tuple[float, ...] | None = None
    difficulty: str = ""


class Task(NamedTuple):
    """A benchmark that has been read and checked."""

    name: str
    source: str  # the file, the folder, or the split that was read
    images: list
    rows: list[Row]
    protocols: tuple[Callable, ...]

    def counts(self) -> dict[str, int]:
        """The numbers of images, of texts to retrieve, and of boxes."""
        return {"images": len(self.images), "boxes": sum(row.box is not None for row in self.rows),
                "texts": sum(len(row.texts) for row in self.rows if row.box is None)}


# ---- protocols -----------------------------------------------------------------------------------
def evaluate_retrieval(model: BetaCLIP, tokenizer: CLIPTokenizer, task: Task) -> Scores:
    """R@1, R@5 and R@10, CLS against EOS, over all images and all captions."""
    texts, image_of_text = embed_captions(model, tokenizer, task.rows)              # [T, D], [T]
    return recall(texts @ embed_images(model, task.images).T, image_of_text)


def recall(similarity: Tensor, image_of_text: Tensor, ks: tuple[int, ...] = (1, 5, 10)) -> Scores:
    """R@k of text to image (T2I) and image to text (I2T, by its best text) from similarity [T, I].
    Ties and NaN count against the model; else, equal scores for all pairs would be perfect."""
    own = similarity.gather(1, image_of_text[:, None])                              # [T, 1]
    t2i_rank = (~(similarity < own)).sum(dim=1) - 1     # its own image is not counted  [T]
    is_own = image_of_text[:, None] == torch.arange(similarity.shape[1], device=similarity.device)
    best_own = similarity.masked_fill(~is_own, -torch.inf).amax(dim=0)              # [I]
    others = similarity.masked_fill(is_own, -torch.inf)
    i2t_rank = (~(others < best_own)).sum(dim=0)[is_own.any(dim=0)]     # of images with a text
    return {f"{direction} R@{k}": 100 * (ranks < k).double().mean().item()
            for direction, ranks in (("T2I", t2i_rank), ("I2T", i2t_rank)) for k in ks}


def evaluate_conditioned(model: BetaCLIP, tokenizer: CLIPTokenizer, task: Task) -> Scores:
    """Text-conditioned retrieval, as in FLAIR: the cosine of a text with what it pools from an
    image, for the CANDIDATES images that CLS ranks highest for the text, and vice versa. (In the
    paper's table 6 each image is pooled by its own caption, which gives the answer away.)"""
    texts, image_of_text = embed_captions(model, tokenizer, task.rows)              # [T, D], [T]
    by_cls = texts @ embed_images(model, task.images).T                             # [T, I]
    is_candidate = []  # for T2I, for I2T
    for dim in (1, 0):
        top = by_cls.topk(min(CANDIDATES, by_cls.shape[dim]), dim=dim).indices
        is_candidate.append(torch.zeros_like(by_cls, dtype=torch.bool).scatter(dim, top, True))
    either = is_candidate[0] | is_candidate[1]
    scores = torch.full_like(by_cls, -torch.inf)
    for indices, _, _, patches in encode_images(model, task.images):
        for index, patches_of_image in zip(indices, patches, strict=True):
            chosen = either[:, index].nonzero()[:, 0]                               # [c]
            if len(chosen):
                of_image_0 = torch.zeros(len(chosen), dtype=torch.long)             # [c]
                pooled = model.pooler(texts[chosen], of_image_0, patches_of_image[None])
                scores[chosen, index] = F.cosine_similarity(pooled, texts[chosen])  # of [c, D]
    results = {}
    for direction, mask in zip(("T2I", "I2T"), is_candidate, strict=True):
        recalls = recall(scores.masked_fill(~mask, -torch.inf), image_of_text)
        results |= {f"pooled {name}": recalls[name] for name in recalls if direction in name}
    return results


def evaluate_fine_grained(model: BetaCLIP, tokenizer: CLIPTokenizer, task: Task) -> Scores:
    """FG-OVD, by difficulty: how often the right text is the most similar to a box, or tied."""
    rows = [row for row in task.rows if row.box is not None]
    texts = embed_texts(model, tokenizer, [text for row in rows for text in row.texts])
    rows_of_image = defaultdict(list)
    for row, row_texts in zip(rows, texts.split([len(row.texts) for row in rows]), strict=True):
        rows_of_image[row.image].append((row, row_texts))
    hits = {row.difficulty: [] for row in rows}
    for indices, sizes, _, patches in encode_images(model, task.images, stretch=True):
        for index, size, patches_of_image in zip(indices, sizes, patches, strict=True):
            for row, row_texts in rows_of_image[index]:
                box = torch.tensor(row.box) / torch.tensor((*size, *size))          # [4]
                region = embed_box(patches_of_image, box.to(patches))               # [D]
                if not region.any():  # all texts would be equally similar to it
                    raise InputError(f"{task.images[index]}: the box {row.box} is outside of it")
                scores = (row_texts * region).sum(dim=1)  # equal texts score equal, unlike with @
                hits[row.difficulty].append(scores[0] >= scores[1:].max())
    return {name: 100 * torch.stack(hits[name]).double().mean().item() for name in hits}


def embed_box(patches: Tensor, box: Tensor) -> Tensor:
    """RoIAlign of a box (x, y, width, height, as fractions) in patches [P, D]: [D], normalised."""
    side = int(len(patches) ** 0.5)
    grid = patches.T.view(1, -1, side, side)                                    # [1, D, side, side]
    corners = box_convert(box[None], "xywh", "xyxy") * side                         # [1, 4]
    region = roi_align(grid, [corners], output_size=1, sampling_ratio=-1, aligned=True)
    return F.normalize(region.flatten(), dim=0)


# ---- embeddings ----------------------------------------------------------------------------------
@torch.no_grad()
def embed_texts(model: BetaCLIP, tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Embed a list of N texts: [N, D], normalised, without gradient, on the model's device."""
    distinct = sorted(dict.fromkeys(texts), key=len)
    index_of = {text: index for index, text in enumerate(distinct)}
    embeddings = []
    for start in range(0, len(distinct), BATCH_SIZE):
        packed = pack(data.tokenize(tokenizer, distinct[start:start + BATCH_SIZE]))
        embeddings.append(model.encode_text(packed.to(model.clip.device)))
    return F.normalize(torch.cat(embeddings), dim=-1)[[index_of[text] for text in texts]]


@torch.no_grad()
def embed_images(model: BetaCLIP, images: list) -> Tensor:
    """Embed a list of I images (PIL or paths) by CLS: [I, D], normalised, without gradient, on the
    model's device. Raises InputError if one cannot be read."""
    cls = [cls for _, _, cls, _ in encode_images(model, images)]
    return F.normalize(torch.cat(cls), dim=-1)


def embed_captions(model: BetaCLIP, tokenizer: CLIPTokenizer,
                   rows: list[Row]) -> tuple[Tensor, Tensor]:
    """The embeddings of all captions [T, D], and the index of the image of each [T]."""
    pairs = [(text, row.image) for row in rows if row.box is None for text in row.texts]
    texts = embed_texts(model, tokenizer, [text for text, _ in pairs])
    return texts, torch.tensor([index for _, index in pairs], device=texts.device)


@torch.no_grad()
def encode_images(model: BetaCLIP, images: list,
                  stretch: bool = False) -> Iterator[tuple[range, list, Tensor, Tensor]]:
    """Encode images in batches; `stretch` as in `data.to_pixels`. Yields their indices, their sizes
    (width, height) in pixels, cls [b, D], and patches [b, P, D]."""
    def read(index: int) -> tuple[tuple[int, int], Tensor]:
        image = open_rgb(images[index])
        return image.size, data.to_pixels(image, model.image_size, stretch)

    starts = range(0, len(images), BATCH_SIZE)
    with ThreadPoolExecutor() as pool:
        for start in tqdm(starts, "images", disable=len(starts) < 8):
            indices = range(start, min(start + BATCH_SIZE, len(images)))
            sizes, pixels = zip(*pool.map(read, indices), strict=True)
            yield indices, sizes, *model.encode_image(torch.stack(pixels).to(model.clip.device))


def open_rgb(image: Any) -> Image.Image:
    """Open a PIL image, a path, or {"bytes", "path"}. Raises InputError."""
    name = image["path"] if isinstance(image, dict) else image
    with input_errors(f"{name}: the image cannot be read", *data.IMAGE_ERRORS):
        if isinstance(image, dict):
            return data.open_image(image, "")
        return data.to_rgb(image if isinstance(image, Image.Image) else Image.open(image))


# ---- benchmarks ----------------------------------------------------------------------------------
# A reader takes a path under --root and yields rows; `load_benchmark` checks them.
def read_scenes(_: Path, split: str = "test") -> Iterator[Row]:
    """Scenes with their captions, and the objects of the originals. Wrong descriptions differ in
    one (hard), two (medium) or three attributes (easy), or are of other scenes (trivial), or of the
    other quarters of the same picture (pointing)."""
    scenes = [data.make_scene(split, index) for index in range(data.NUM_SCENES[split])]
    pictures = [data.draw_scene(scene) for scene in scenes]
    for scene, picture in zip(scenes, pictures, strict=True):
        yield Row(picture, [". ".join(data.describe_scene(scene)[0])])
    side = data.CARD_PIXELS
    for index in range(0, len(scenes), data.GROUP_SIZE):
        neighbours = [scenes[(index + data.GROUP_SIZE * i) % len(scenes)] for i in (1, 2, 3, 4)]
        for quarter, obj in enumerate(scenes[index]):
            rng = random.Random(f"{index} {quarter}")
            others = [list(data.vary_object(obj, number)) for number in (1, 2, 3)]
            others.append([other for scene in neighbours for other in scene if other != obj])
            right = data.describe_object(obj)
            box = (side * (quarter % 2), side * (quarter // 2), side, side)
            for difficulty, objects in zip(FGOVD_FILES, others, strict=True):
                wrong = list(dict.fromkeys(data.describe_object(other) for other in objects))
                yield Row(pictures[index], [right, *rng.sample(wrong, 10)], box, difficulty)
            wrong = [data.describe_object(other) for other in scenes[index] if other is not obj]
            yield Row(pictures[index], [right, *wrong], box, "pointing")


def read_urban1k(folder: Path) -> Iterator[Row]:
    """1,000 pairs: Urban1k/image/N.jpg, and the first line of Urban1k/caption/N.txt."""
    if not folder.exists():
        with input_errors(f"{URBAN1K_URL} cannot be downloaded: unpack it in {folder.parent}"):
            download_and_extract_archive(URBAN1K_URL, folder.parent)
    for caption_file in sorted(folder.glob("caption/*.txt")):
        with input_errors(f"{caption_file} cannot be read"):
            lines = caption_file.read_text(encoding="utf-8-sig").splitlines()
        yield Row(f"Urban1k/image/{caption_file.stem}.jpg", lines[:1] or [""])


def read_sv1k(path: Path) -> Iterator[Row]:
    """The first 1,000 rows of a ShareGPT4V list, with their whole captions."""
    rows, _, _ = data.read_table(path)
    for row in itertools.islice(rows, data.NUM_HELD_OUT):
        captions = data.captions_of(row["caption"])
        yield Row(row["image"], [data.remove_repetitions(caption) for caption in captions])


def read_dci(folder: Path, keys: tuple[str, ...] = ("extra_caption",)) -> Iterator[Row]:
    """Densely Captioned Images, all splits: 7,805 images, each with the captions `keys`, joined."""
    for name in itertools.chain(*read_json(folder / "splits.json").values()):
        row = read_json((folder / "annotations" / name).with_suffix(".json"))
        yield Row(f"{DCI}/photos/{row['image']}", ["\n".join(row[key] for key in keys)])


def read_coco(path: Path) -> Iterator[Row]:
    """COCO val2017: 5,000 images with their first five captions, as is usual."""
    annotations = read_json(path)
    captions = defaultdict(list)
    for row in annotations["annotations"]:
        captions[row["image_id"]].append(row["caption"])
    for row in annotations["images"]:
        yield Row(f"val2017/{row['file_name']}", captions[row["id"]][:5])


def read_fgovd(path: Path) -> Iterator[Row]:
    """FG-OVD: 11,357 boxes, as FG-CLIP's lines of JSON or as the official files."""
    for difficulty, names in FGOVD_FILES.items():
        file = path.with_name(names[0 if path.suffix == ".jsonl" else 1])
        rows = read_json(file)
        if isinstance(rows, dict):
            file_names = {}
            for image in rows["images"]:
                parts = image.get("coco_url", image["file_name"]).split("/")
                file_names[image["id"]] = "/".join(parts[-2:])  # such as val2017/000000000139.jpg
            rows = [row | {"img_path": file_names[row["image_id"]]} for row in rows["annotations"]]
        if not rows:
            raise InputError(f"{file} has no rows")
        for row in rows:
            right = row["pos_expression"]
            right = right[:1] if isinstance(right, list) else [right]
            texts = [*right, *(row["neg_expression"] or ())]
            yield Row(row["img_path"], texts, row["bbox"] or (), difficulty)


def read_json(path: Path) -> Any:
    """The contents of a JSON file, or of a JSON Lines file as a list."""
    with input_errors(f"{path} cannot be read"):
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        return json.loads(text)


DCI = "densely_captioned_images"
# name: alternative files or folders under --root (none if built in), reader, protocols
BENCHMARKS = {
    "scenes": ((), read_scenes, evaluate_fine_grained, evaluate_retrieval),
    "urban1k": (("Urban1k",), read_urban1k, evaluate_retrieval),
    "sv1k": (data.SHAREGPT4V_LISTS, read_sv1k, evaluate_retrieval),
    "dci": ((DCI,), read_dci, evaluate_retrieval),  # as in FG-CLIP
    "dci-short": ((DCI,), partial(read_dci, keys=("short_caption", "extra_caption")),
                  evaluate_retrieval),  # both captions, as in LoTLIP and FLAIR
    "coco": (("captions_val2017.json",), read_coco, evaluate_retrieval),
    "fgovd": (FGOVD_FILES["hard"], read_fgovd, evaluate_fine_grained),
}
BUILT_IN = [name for name, (paths, *_) in BENCHMARKS.items() if not paths]
# Results of the paper, ViT-B/16, β = 0.5, K = 36; with a star, of the released checkpoint (CE) as
# measured by others; on the scenes, chance. In the order of METRICS.
METRICS = ("T2I R@1", "I2T R@1", "hard", "medium", "easy", "trivial", "pointing")
REFERENCES = {
    "urban1k": ("CE 89.0, BCE 91.8", "CE 88.6, BCE 92.3"), "dci": ("CE 59.9, BCE 65.1", "BCE 63.6"),
    "sv1k": ("CE 93.7, BCE 94.4", "CE 94.0, BCE 94.1"), "coco": ("CE 33.2*", "CE 45.6*"),
    "flickr30k": ("CE 64.0*", "CE 74.5*"), "docci": ("CE 67.9*", "CE 68.0*"),
    "fgovd": ("", "", "CE 30.9, BCE 20.1", "CE 55.4, BCE 38.5", "CE 60.4, BCE 34.2",
              "CE 80.3, BCE 71.3"),
    "scenes": ("", "", *["chance 9.1"] * 4, "chance 25.0")}


def find_benchmarks(root: str | Path) -> dict[str, Path]:
    """The benchmarks that are there under root, by name, and the path of each."""
    paths = {name: [Path(root, path) for path in paths if Path(root, path).exists()]
             for name, (paths, *_) in BENCHMARKS.items()}
    return {name: existing[0] for name, existing in paths.items() if existing}


def load_benchmark(name: str, root: str | Path, columns: str | None = None) -> Task:
    """Read a benchmark, one of BENCHMARKS or a file of images and captions (for columns see
    `data.read_table`), and check all of it before anything is encoded. Raises InputError."""
    if name in BENCHMARKS:
        paths, read, *protocols = BENCHMARKS[name]
        path = find_benchmarks(root).get(name, Path(root, *paths[:1]))
        source = path.name if paths else ""
        rows = read(path)
    else:
        path = name
        table, source, _ = data.read_table(name, columns, EVALUATION_SPLITS)
        rows = (Row(row["image"], data.captions_of(row["caption"])) for row in table)
        protocols = [evaluate_retrieval]
    images = {}
    checked = []
    try:
        for row in rows:
            where = f"{path}, row {len(checked) + 1} of the benchmark"
            if not row.texts or not all(isinstance(text, str) for text in row.texts):
                raise InputError(f"{where}: there is no text for {row.image}")
            has_area = row.box is None or (len(row.box) == 4 and min(row.box[2:]) > 0)
            if not has_area or (row.box is not None and len(row.texts) < 2):
                raise InputError(f"{where} needs a bbox of positive size and a wrong text")
            key = row.image if isinstance(row.image, str) else id(row.image)
            if isinstance(row.image, dict):
                key = row.image["bytes"] or row.image["path"]
            index, _ = images.setdefault(key, (len(images), row.image))
            checked.append(row._replace(image=index))
    except KeyError as key:
        raise InputError(f"{path}, row {len(checked) + 1} of the benchmark lacks {key}") from key
    if not checked:
        raise InputError(f"{path} has no rows")
    images = [image for _, image in images.values()]
    names = [image for image in images if isinstance(image, str)]
    exists = data.files_exist(names, root)
    missing = [Path(root, name) for name, found in zip(names, exists, strict=True) if not found]
    if missing:
        folders = Counter(str(file.parent) for file in missing).items()
        counts = ", ".join(f"{count} in {folder}" for folder, count in folders)
        raise InputError(f"{name}: {len(missing)} of {len(images)} images are missing ({counts}), "
                         f"for instance {missing[0]}")
    images = [data.resolve_path(image, root) if isinstance(image, str)
              or (isinstance(image, dict) and not image["bytes"]) else image for image in images]
    empty = sum(not text.strip() for row in checked for text in row.texts)
    if empty:
        print(f"note: {empty} texts of {name} are empty, and encoded as such", file=sys.stderr)
    return Task(name, source, images, checked, tuple(protocols))


@torch.no_grad()
def evaluate(model: BetaCLIP, tokenizer: CLIPTokenizer, task: Task,
             conditioned: bool = False) -> Scores:
    """Evaluate a model on a task. Raises InputError for an image that cannot be read."""
    model.eval()
    protocols = list(task.protocols)
    if conditioned and model.use_pooler and evaluate_retrieval in protocols:
        protocols.append(evaluate_conditioned)
    scores = {}
    for protocol in protocols:
        scores |= protocol(model, tokenizer, task)
    return scores


def format_table(task: Task, scores_of_models: dict[str, Scores]) -> str:
    """A table of the scores on a task: a line per metric, a column per model, and references."""
    counts = [f"{count:,} {what}" for what, count in task.counts().items() if count]
    source = f" ({task.source})" if task.source else ""
    names = "".join(f"{name:>8}  " for name in scores_of_models)
    lines = [f"{task.name}{source}: {', '.join(counts)}", f"{'metric':<18}{names}reference"]
    references = dict(zip(METRICS, REFERENCES.get(Path(task.name).stem, ()), strict=False))
    for metric in dict.fromkeys(itertools.chain(*scores_of_models.values())):
        line = f"{metric:<18}"
        for name, scores in scores_of_models.items():
            cell = f"{scores[metric]:.1f}" if metric in scores else ""
            line += f"{cell:>{max(8, len(name))}}  "
        lines.append((line + references.get(metric, "")).rstrip())
    return "\n".join(lines)


# ---- heat maps -----------------------------------------------------------------------------------
@torch.no_grad()
def compute_heatmaps(model: BetaCLIP, tokenizer: CLIPTokenizer, image: Any,
                     queries: list[str]) -> dict[str, Tensor]:
    """Where a model finds Q queries in the centre crop of an image: the "similarity" of each patch,
    a cosine, and the "attention" of the pooler, if there is one; [Q, side, side] on the CPU."""
    pixels = data.to_pixels(open_rgb(image), model.image_size)[None].to(model.clip.device)
    patches = F.normalize(model.encode_image(pixels)[1], dim=-1)                    # [1, P, D]
    texts = embed_texts(model, tokenizer, queries)[None]                            # [1, Q, D]
    maps = {"similarity": texts @ patches.transpose(1, 2)}                          # [1, Q, P]
    if model.use_pooler:
        maps["attention"] = model.pooler.attn(texts, patches, patches)[1]
    side = int(patches.shape[1] ** 0.5)
    return {name: heat[0].unflatten(1, (side, side)).cpu() for name, heat in maps.items()}


# ---- command line --------------------------------------------------------------------------------
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--bench", nargs="+", default=["scenes"], metavar="NAME", help=f"{', '.join(BENCHMARKS)}; "
        "all (scenes, and any under --root); or as train.py --val (default: scenes)")
    add("--ckpt", nargs="+", metavar="MODEL", help="runs, checkpoints of the authors, CLIPs on the "
        "hub or in a folder: a column each (default: the latest finished run)")
    add("--root", default="data", help="folder of the benchmarks and images (default: data)")
    add("--columns", metavar="IMAGE,CAPTION", help="the names of the columns of a file")
    add("--conditioned", action="store_true", help="add text-conditioned retrieval, by the pooler")
    add("--json", metavar="FILE", help="also write the scores to a file")
    args = parser.parse_args(argv)
    runs = sorted(Path("runs").glob("*/eval.json"), key=lambda path: path.stat().st_mtime)
    if not args.ckpt and not runs:
        raise InputError("there is no finished run under runs/: pass --ckpt, or run train.py")
    sources = args.ckpt or [str(runs[-1].parent)]
    loaded = {source: load(source) for source in sources}
    for source, (model, _) in loaded.items():
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        if model.missing_names:
            print(f"{source}: untrained: {', '.join(model.missing_names)}", file=sys.stderr)
    everything = [*BUILT_IN, *find_benchmarks(args.root)]
    names = itertools.chain(*[everything if name == "all" else [name] for name in args.bench])
    records = []
    for task in [load_benchmark(name, args.root, args.columns) for name in dict.fromkeys(names)]:
        scores_of_models = {source: evaluate(*pair, task, args.conditioned)
                            for source, pair in loaded.items()}
        print(format_table(task, scores_of_models), flush=True)
        header = {"benchmark": task.name, "split": task.source} | task.counts()
        records += [header | {"model": source, "metric": metric, "score": score}
                    for source, scores in scores_of_models.items()
                    for metric, score in scores.items()]
    if args.json:
        with input_errors(f"--json {args.json} cannot be written"):
            Path(args.json).write_text(json.dumps(records, indent=1), encoding="utf-8")


if __name__ == "__main__":
    with command_line():
        main()
