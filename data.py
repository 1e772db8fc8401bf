"""Images, queries and batches: the input of a training step (paper, section 4.1).

A sample is an image and its queries, [(text, level)]: the caption, its sentences, its phrases.
`Captions` reads images and captions from disk; `Scenes`, at the end, draws its own pictures.
"""

import glob
import hashlib
import inspect
import io
import itertools
import os
import random
import re
import struct
import types
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageDraw, ImageOps
from tokenizers import AddedToken, pre_tokenizers
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize
from transformers import CLIPTokenizer

from model import CONTEXT, InputError, PackedTexts, input_errors, pack, straighten_quotes

TOKEN_LIMITS = {"caption": CONTEXT, "sentence": CONTEXT, "phrase": 30}
LEVELS = tuple(TOKEN_LIMITS)  # `Batch.level` indexes this; the limits include BOS and EOS
CAPTION_SENTENCES = 5  # sentences in a caption if sentences are not queries (--sentences 0)
FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
           ".tar": "webdataset"}  # by suffix: `datasets`' name of the format
CSV_OPTIONS = {"sep": None, "engine": "python", "keep_default_na": False, "encoding": "utf-8-sig"}
COLUMNS = (("image", "caption"), ("image", "conversations"), ("filepath", "title"), ("jpg", "txt"))
SHAREGPT4V = "share-captioner_coco_lcs_sam_1246k_1107"  # the names of its lists begin with this
SHAREGPT4V_LISTS = (f"{SHAREGPT4V}_filtered.json", f"{SHAREGPT4V}.json")  # the authors', the public
NUM_HELD_OUT = 1000  # the first rows of either list are the test set SV-1k
IMAGE_ERRORS = (OSError, ValueError, TypeError, AttributeError, SyntaxError, RuntimeError,
                struct.error, Image.DecompressionBombError)  # what PIL raises for broken images


# ---- captions on disk ----------------------------------------------------------------------------
class Captions:
    """Images and captions. captions[epoch, index] is a sample: pixels uint8 [3, size, size], its
    queries, and reading errors. Each epoch has its own crops and sentences. For source and columns
    see `read_table`, for limits `make_queries`; the names of image files are relative to root."""

    def __init__(self, source: str | Path, root: str | Path, size: int, limits: tuple[int, int],
                 seed: int = 0, columns: str | None = None) -> None:
        """Read the rows and prepare their queries (cached). Raises InputError."""
        self.root = root
        self.size = size
        self.limits = limits
        self.seed = seed
        rows, self.split, files = read_table(source, columns)
        is_sharegpt4v = any(SHAREGPT4V in f"{file} {Path(file).resolve()}" for file in files)
        has_both = all(Path(root, name).is_file() for name in SHAREGPT4V_LISTS)
        if is_sharegpt4v and (len(files) > 1 or has_both):
            raise InputError(f"{source}: keep only one list of ShareGPT4V, to hold SV-1k out")
        held_out = min(NUM_HELD_OUT, len(rows)) if is_sharegpt4v else 0
        listed = len(rows) - held_out
        kept = list(range(held_out, len(rows)))
        hasher = hashlib.sha256()
        if "string" in rows.features["image"].dtype:  # file names, not stored images
            names = rows["image"][:]
            exists = files_exist(names, root)
            kept = [row for row in kept if exists[row]]
            if not kept and listed:
                raise InputError(f"{source}: none of its {listed} images is under "
                                 f"--root {root}, for instance {names[held_out]}")
            hasher.update("\n".join(names[row] for row in kept).encode())
        self.rows = rows.select(kept) if len(kept) < len(rows) else rows
        self.prepared = prepare_captions(self.rows, with_phrases=limits[1] > 0)
        for batch in self.prepared.with_format("arrow").iter(1000):
            hasher.update(batch.combine_chunks().to_batches()[0].serialize())
        self.fingerprint = hasher.hexdigest()  # to identify a resumed run's data
        self.summary = (f"{source}: {len(self)} rows; left out: {held_out} of the test set SV-1k, "
                        f"{listed - len(kept)} (of {listed}) with no image under {root}, "
                        f"{len(kept) - len(self)} without a caption")

    def __len__(self) -> int:
        return len(self.prepared)

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> tuple[Tensor, list, list[str]]:
        rng = random.Random(f"{self.seed} {epoch_and_index}")
        index = epoch_and_index[1]
        pixels = torch.zeros(3, self.size, self.size, dtype=torch.uint8)  # if all attempts fail
        read_errors = []
        for _ in range(20):  # if an image is unreadable, try others; train.py counts errors
            prepared = self.prepared[index]  # caption and image are replaced together
            image = self.rows[prepared["row"]]["image"]
            try:
                picture = open_image(image, self.root, 2 * self.size)  # crops still exceed size
            except IMAGE_ERRORS as error:
                name = image["path"] if isinstance(image, dict) else image
                read_errors = read_errors or [f"{name}: {error}"]
                index = rng.randrange(len(self))
            else:
                pixels = random_crop(picture, self.size, rng)
                break
        number = rng.randrange(len(prepared["sentences"]))  # one of the row's captions
        queries = make_queries(prepared["sentences"][number], prepared["phrases"][number],
                               self.limits, rng)
        return pixels, queries, read_errors


def read_table(source: str | Path, columns: str | None = None,
               splits: Iterable[str] = ("train",)) -> tuple[Any, str, list[str]]:
    """Read images and captions with `datasets`.

    source:  a file (see FORMATS; or a glob), a folder, or a data set on the hub (OWNER/NAME)
    columns: "IMAGE,CAPTION", the columns' names, if they are not among COLUMNS
    splits:  the first that exists is read; if none does, train, or else the first split
    Returns rows of "image" (a file name, or {"bytes", "path"}) and "caption"; the name of the split
    ("" for a file); and the names of the files, as far as known. Raises InputError.
    """
    import datasets

    source = str(source)
    format_name = FORMATS.get(Path(source).suffix)
    options = dict(CSV_OPTIONS) if format_name == "csv" else {}
    if format_name:
        path = os.path.abspath(source)
        options["data_files"] = glob.escape(path) if os.path.isfile(path) else path
    elif not os.path.isdir(source) and source.count("/") != 1:
        raise InputError(f"{source} is no file ({', '.join(FORMATS)}), folder, or OWNER/NAME")
    reading = partial(input_errors, f"{source} cannot be read", datasets.exceptions.DatasetsError,
                      StopIteration)  # of an empty file
    with reading():
        builder = datasets.load_dataset_builder(format_name or source, **options)
        builder.download_and_prepare()
        all_splits = builder.as_dataset()
    split = next(name for name in (*splits, "train", *all_splits) if name in all_splits)
    rows = all_splits[split]
    pairs = [tuple(columns.split(","))] if columns else COLUMNS
    found = [pair for pair in pairs if set(pair) <= set(rows.column_names)]
    if not found and "annotations" in rows.column_names:  # {"annotations": rows}
        with reading():
            rows = datasets.load_dataset(format_name, field="annotations", split="train", **options)
        found = [pair for pair in pairs if set(pair) <= set(rows.column_names)]
    if not found or len(found[0]) != 2:
        raise InputError(f"{source} has the columns {', '.join(rows.column_names)}, but not "
                         f"{' and '.join(pairs[0])}: use --columns IMAGE,CAPTION")
    rows = rows.select_columns(list(found[0]))
    rows = rows.rename_columns(dict(zip(found[0], ("image", "caption"), strict=True)))
    with reading():
        rows.data.validate(full=True)  # that it is UTF-8, for instance
        if getattr(rows.features["image"], "dtype", "") not in ("string", "large_string"):
            rows = rows.cast_column("image", datasets.Image(decode=False))
    files = (builder.config.data_files or {}).get(split, [])
    return rows, "" if format_name else split, [str(file) for file in files]


def files_exist(names: Iterable[str | None], root: str | Path) -> list[bool]:
    """Whether each file is under root. Folders are listed, which is quicker for many files."""
    listings = {}
    exists = []
    for name in names:
        folder, file = os.path.split(resolve_path(name, root) or "") if name else ("", "")
        if folder not in listings:
            listings[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        exists.append(file in listings[folder])
    return exists


def captions_of(cell: Any) -> list[str]:
    """The captions in a cell: a string, a list of strings, or a conversation's first answer."""
    parts = [cell] if isinstance(cell, str) else cell or []
    if not isinstance(parts, list):
        raise InputError(f"captions must be strings or lists of strings, not {cell!r}")
    turns = [part for part in parts if isinstance(part, dict)]
    answers = [turn.get("value") or "" for turn in turns if turn.get("from") == "gpt"]
    return answers[:1] or [part for part in parts if isinstance(part, str)]


# ---- captions to queries -------------------------------------------------------------------------
def make_queries(sentences: list[str], phrases: list[list[list[str]]], limits: tuple[int, int],
                 rng: random.Random) -> list[tuple[str, str]]:
    """Draw the queries of a sample, [(text, level)]: first the caption query, some sentences of a
    caption; then these sentences; and their phrases (`phrases` has those of each sentence, from
    `extract_phrases`). limits: maximum numbers of sentences (drawn at random; if fewer, all in
    order) and of phrases (the first). At 0 sentences, captions still join CAPTION_SENTENCES."""
    max_sentences, max_phrases = limits
    chosen = range(len(sentences))
    if len(chosen) >= (max_sentences or CAPTION_SENTENCES):
        chosen = rng.sample(chosen, max_sentences or CAPTION_SENTENCES)
    sentences = [sentences[i] for i in chosen]
    queries = [(". ".join(sentences), "caption")]
    if max_sentences:
        queries += [(sentence, "sentence") for sentence in sentences]
    all_phrases = order_phrases([phrases[i] for i in chosen])
    queries += [(phrase, "phrase") for phrase in all_phrases[:max_phrases]]
    return queries


def remove_repetitions(caption: str) -> str:
    """Remove what captioners repeat: "a red red car" becomes "a red car", and, in captions of over
    100 characters, three or more copies in a row of a string (3 to 20 characters) become one."""
    caption = caption.replace("\n", " ")
    if len(caption) > 100:
        for shortest in (10, 5, 3):  # copies of 10 to 20 characters, then of 5 to 20, of 3 to 20
            caption = re.sub(rf"(.{{{shortest},20}})\1{{2,}}", r"\1", caption, count=10)
    return " ".join(word for word, _ in itertools.groupby(caption.split()))


def split_sentences(caption: str) -> list[str]:
    """Split at ". ", so that only the last sentence may keep its full stop."""
    return [sentence.strip() for sentence in caption.split(". ") if sentence.strip()]


def prepare_captions(rows: Any, with_phrases: bool) -> Any:
    """`split_captions` of all rows, cached by rows and code; other processes wait for it."""
    import datasets

    rows = rows.remove_columns("image")
    text = datasets.Value("string")
    features = {"row": datasets.Value("int64"), "sentences": [[text]], "phrases": [[[[text]]]]}
    code = code_of(split_captions)
    key = datasets.fingerprint.Hasher.hash((rows._fingerprint, with_phrases, code))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with FileLock(Path(datasets.config.HF_DATASETS_CACHE, f"beta_clip_{key}.lock")):
        return rows.map(
            split_captions, fn_kwargs={"with_phrases": with_phrases}, with_indices=True,
            batched=True, remove_columns=rows.column_names, features=datasets.Features(features),
            new_fingerprint=key, num_proc=min(cores, len(rows) // 1000) or None, desc="captions")


def split_captions(columns: dict[str, list], row_numbers: list[int],
                   with_phrases: bool) -> dict[str, list]:
    """Split the captions of some rows: row [R], sentences [R][caption][sentence] and, from
    `extract_phrases`, phrases [R][caption][sentence][type][i]. Rows with no caption are dropped."""
    result = {"row": [], "sentences": [], "phrases": []}
    for number, cell in zip(row_numbers, columns["caption"], strict=True):
        captions = [split_sentences(remove_repetitions(text)) for text in captions_of(cell)]
        captions = [sentences for sentences in captions if sentences]
        if captions:
            result["row"].append(number)
            result["sentences"].append(captions)
    phrases = itertools.repeat([[], [], []])  # one item for each sentence
    if with_phrases:
        nlp, matchers = load_spacy()
        all_sentences = itertools.chain(*itertools.chain(*result["sentences"]))
        texts = (sentence.removesuffix(".") + "." for sentence in all_sentences)
        phrases = (extract_phrases(doc, matchers) for doc in nlp.pipe(texts, batch_size=256))
    for captions in result["sentences"]:
        result["phrases"].append([[next(phrases) for _ in sentences] for sentences in captions])
    return result


@cache
def load_spacy() -> tuple[Any, list]:
    """spaCy's English pipeline, and the phrase matchers."""
    with input_errors("phrases need spaCy and its English model: `pip install spacy && python -m "
                      "spacy download en_core_web_sm`; or pass --phrases 0"):
        import spacy
        nlp = spacy.load("en_core_web_sm", exclude=["ner", "lemmatizer"])
    return nlp, build_phrase_matchers(nlp.vocab)


def build_phrase_matchers(vocab: Any) -> list:
    """spaCy matchers of noun phrases that extend to a place ("a dog on the left of"), of actions
    ("leaning against") and of places ("next to", "in the middle of")."""
    from spacy.matcher import Matcher

    sides = ["left", "right", "top", "bottom", "front", "back", "middle", "center"]
    side = {"LOWER": {"IN": sides}}
    place = {"LOWER": {"IN": ["inside", "outside", "above", "below", "under", "over", "centered",
                              "frontside", "backside", "near", "nearby", "far", *sides]}}
    determiner = {"POS": "DET", "OP": "?"}
    words = {"POS": {"IN": ["ADJ", "NOUN", "PROPN"]}, "OP": "+"}
    preposition = {"POS": "ADP"}
    the = {"LOWER": "the", "OP": "?"}
    of = {"LOWER": "of", "OP": "?"}
    next_to = [{"LOWER": "next", "POS": "ADV"}, {"LOWER": "to", "POS": "ADP"}]
    matchers = []
    for patterns in ([[determiner, words, preposition, the, side, of]],
                     [[{"POS": "VERB"}, preposition]],
                     [next_to, [preposition, determiner, place, of]]):
        matchers.append(Matcher(vocab))
        matchers[-1].add("phrase", patterns, greedy="LONGEST")
    return matchers


def extract_phrases(doc: Any, matchers: list) -> list[list[str]]:
    """The phrases of a parsed sentence: noun phrases, actions, and places, in three lists."""
    from spacy.util import filter_spans

    nouns, actions, places = (matcher(doc, as_spans=True) for matcher in matchers)
    nouns = filter_spans([*doc.noun_chunks, *nouns])  # keeps the longest of overlapping spans
    return [[span.text for span in nouns], [span.text for span in sorted(actions)],  # by position
            [span.text.lower() for span in sorted(places)]]


def order_phrases(phrases_of_sentences: list[list[list[str]]]) -> list[str]:
    """Merge results of `extract_phrases`: all noun phrases, all actions, all places, once each."""
    merged = {}
    for phrase_type in range(3):
        for phrases in phrases_of_sentences:
            merged |= dict.fromkeys(phrases[phrase_type])
    return [phrase for phrase in merged if phrase not in ("the", "image", "the image")]


def code_of(function: Callable, found: dict[str, str] | None = None) -> dict[str, str]:
    """The source of a function and of those that it calls in this file, and the constants that they
    read. While these (and spaCy, which is not checked) stay the same, a cached result is valid."""
    found = {} if found is None else found
    found[function.__name__] = inspect.getsource(function)
    for name in sorted(set(re.findall(r"\w+", found[function.__name__]))):
        value = inspect.unwrap(globals().get(name))  # without @cache; None if not a global
        if isinstance(value, types.FunctionType) and name not in found:
            code_of(value, found)
        elif isinstance(value, (str, int, float, tuple, list, dict)):
            found[name] = repr(value)
        elif isinstance(value, (set, frozenset)):
            found[name] = repr(sorted(value))
    return found


# ---- images --------------------------------------------------------------------------------------
def open_image(image: str | dict, root: str | Path, min_side: int | None = None) -> Image.Image:
    """Open the image in a cell, upright, in RGB. With min_side, a JPEG is decoded at 1/2, 1/4 or
    1/8 of its size, for speed, if both sides keep min_side pixels. Raises IMAGE_ERRORS."""
    stored = isinstance(image, dict) and image["bytes"]
    file = io.BytesIO(stored) if stored else resolve_path(image, root)
    if file is None:
        raise ValueError(f"it is not under {root}")
    with Image.open(file) as opened:
        if min_side:
            opened.draft("RGB", (min_side, min_side))
        return to_rgb(opened)


def resolve_path(image: str | dict, root: str | Path) -> str | None:
    """The path of an image, a name or {"path"}; None if a name leads out of root."""
    folder = os.path.join(os.path.abspath(root), "")
    if isinstance(image, dict):
        image = image["path"] or ""
        if os.path.isabs(image):  # `datasets` found it in the folder that it read
            return image
    path = os.path.abspath(os.path.join(folder, image))
    return path if path.startswith(folder) else None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any image to RGB, upright (EXIF). 16 bits, which PIL would clip, are scaled."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) / 256).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def to_pixels(image: Image.Image, size: int, stretch: bool = False) -> Tensor:
    """Pixels for evaluation, uint8 [3, size, size], of an image as `to_rgb` makes it: its centre,
    resized by the shorter side; or, if `stretch`, all of it, whatever its aspect ratio (FG-OVD)."""
    if stretch:
        return pil_to_tensor(image.resize((size, size)))
    return pil_to_tensor(center_crop(resize(image, size, Image.Resampling.BICUBIC), size))


def random_crop(image: Image.Image, size: int, rng: random.Random) -> Tensor:
    """Pixels for training, uint8 [3, size, size]: a RandomResizedCrop of at least half the area."""
    with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's generator
        torch.manual_seed(rng.getrandbits(63))
        return pil_to_tensor(RandomResizedCrop(size, scale=(0.5, 1))(image))


# ---- batches -------------------------------------------------------------------------------------
class Batch(NamedTuple):
    """B images and their N queries."""

    pixels: Tensor          # [B, 3, size, size] uint8
    texts: PackedTexts      # the tokens of the N queries
    image_of_query: Tensor  # [N] sorted; stays on the CPU, to be read without waiting
    level: Tensor           # [N] an index into LEVELS; for your own loss, ours do not read it
    caption_index: Tensor   # [B] index of each image's caption among the queries
    read_errors: list[str]  # about images that could not be read

    def to(self, device: torch.device) -> "Batch":
        moved = {name: getattr(self, name).to(device, non_blocking=True)
                 for name in ("pixels", "level", "caption_index")}
        return self._replace(texts=self.texts.to(device), **moved)


def collate(samples: list[tuple], tokenizer: CLIPTokenizer, captions_only: bool = False) -> Batch:
    """Batch samples, in a loader's process. The first query of each sample is its caption."""
    pixels, queries, read_errors = zip(*samples, strict=True)
    if captions_only:
        queries = [sample[:1] for sample in queries]
    texts, levels = zip(*itertools.chain(*queries), strict=True)
    counts = torch.tensor([len(sample) for sample in queries])                      # [B]
    return Batch(
        pixels=torch.stack(pixels),
        texts=pack(tokenize(tokenizer, texts, [TOKEN_LIMITS[level] for level in levels])),
        image_of_query=torch.arange(len(samples)).repeat_interleave(counts),
        level=torch.tensor([LEVELS.index(level) for level in levels]),
        caption_index=counts.cumsum(0) - counts,
        read_errors=list(itertools.chain(*read_errors)))


def tokenize(tokenizer: CLIPTokenizer, texts: Iterable[str],
             token_limits: list[int] | None = None) -> list[list[int]]:
    """Token ids of each text, BOS … EOS, cut to its limit (by default 248) so that EOS stays."""
    all_ids = [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts)]
    token_limits = token_limits or [CONTEXT] * len(all_ids)
    return [ids if len(ids) <= limit else ids[:limit - 1] + ids[-1:]
            for ids, limit in zip(all_ids, token_limits, strict=True)]


def sample_order(num_samples: int, batch_size: int, start: int, stop: int, rank: int = 0,
                 world_size: int = 1, seed: int = 0) -> Iterator[list[tuple[int, int]]]:
    """Yield this rank's batches, lists of (epoch, index): images `start` to `stop` of an endless
    stream that all ranks share, of which each micro-step takes the next world_size · batch_size. If
    a run is resumed with another such product, an epoch may repeat or skip some images."""
    global_size = world_size * batch_size
    stream = itertools.islice(shuffle_epochs(num_samples, global_size, start, seed), start, None)
    for _ in range(start, stop, global_size):
        chosen = list(itertools.islice(stream, global_size))
        yield chosen[rank * batch_size:(rank + 1) * batch_size]


def shuffle_epochs(num_samples: int, global_size: int, start: int, seed: int) -> Iterator[tuple]:
    """Yield (epoch, index) endlessly: each sample once per epoch, in random order, and none twice
    in the same global batch; one such batch begins at `start`."""
    previous_order = np.empty(0, int)
    for epoch in itertools.count():
        order = np.random.default_rng([seed, epoch]).permutation(num_samples)
        carried = (epoch * num_samples - start) % global_size if epoch else 0
        if carried:  # so many of the epoch before are in the batch that this one completes
            is_new = np.isin(order, previous_order[-carried:], invert=True)
            first = np.flatnonzero(is_new)[:global_size - carried]
            order = np.concatenate([order[first], np.delete(order, first)])
        for index in order.tolist():
            yield epoch, index
        previous_order = order


# ---- scenes --------------------------------------------------------------------------------------
# Pictures that a small model learns in minutes: in each quarter an object on a card. There are
# 1,152 kinds of object, so that in a batch most have no double, which would be a false negative.
PICTURE_PIXELS = 64  # a side
CARD_PIXELS = 32
COLOURS = ["red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "white"]
# corners, and rotation in degrees
SHAPES = {"triangle": (3, 0), "square": (4, 0), "diamond": (4, 45), "circle": (30, 0)}
TEXTURES = {"plain": lambda x, y: x < 0,  # where a card is dark, by column x and row y
            "striped": lambda x, y: (y + 3) % 5 < 2,
            "dotted": lambda x, y: ((x + 4) % 5 < 2) & ((y + 4) % 5 < 2),
            "checkered": lambda x, y: (x // 4 + y // 4) % 2 > 0}
ATTRIBUTES = {"colour": COLOURS, "shape": list(SHAPES), "texture": list(TEXTURES), "card": COLOURS}
QUARTERS = ("top left", "top right", "bottom left", "bottom right")
NUM_SCENES = {"train": 50_000, "val": 1_000, "test": 1_000}
GROUP_SIZE = 4  # scenes of val and test: an original, and three others with one change each


class Scenes:
    """The training scenes, drawn on demand. scenes[epoch, index] is a sample as in `Captions`."""

    fingerprint = summary = split = "scenes"

    def __init__(self, size: int, limits: tuple[int, int], seed: int = 0) -> None:
        self.size = size
        self.limits = limits
        self.seed = seed

    def __len__(self) -> int:
        return NUM_SCENES["train"]

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> tuple[Tensor, list, list[str]]:
        rng = random.Random(f"{self.seed} {epoch_and_index}")
        scene = make_scene("train", epoch_and_index[1])
        queries = make_queries(*describe_scene(scene), self.limits, rng)
        return to_pixels(draw_scene(scene), self.size), queries, []


def make_scene(split: str, index: int) -> list[dict]:
    """The four objects of a scene: a group's original, or a copy with object `member` changed."""
    group, member = (index, 0) if split == "train" else divmod(index, GROUP_SIZE)
    rng = random.Random(f"{split} {group}")
    scene = []
    for _ in QUARTERS:
        obj = {name: rng.choice(values) for name, values in ATTRIBUTES.items()}
        while obj["card"] == obj["colour"]:
            obj["card"] = rng.choice(COLOURS)
        scene.append(obj)
    if member:  # in one attribute; the group's seed makes it the same one in all three
        scene[member] = rng.choice(list(vary_object(scene[member], 1)))
    return scene


def vary_object(obj: dict, num_changes: int) -> Iterator[dict]:
    """All objects that differ from one in exactly num_changes attributes."""
    for names in itertools.combinations(ATTRIBUTES, num_changes):
        choices = [[value for value in ATTRIBUTES[name] if value != obj[name]] for name in names]
        for values in itertools.product(*choices):
            other = obj | dict(zip(names, values, strict=True))
            if other["card"] != other["colour"]:
                yield other


def describe_object(obj: dict) -> str:
    """A description, such as "a red diamond on a striped orange card"."""
    return "a {colour} {shape} on a {texture} {card} card".format(**obj)


def describe_scene(scene: list[dict]) -> tuple[list[str], list[list[list[str]]]]:
    """A sentence about each object, and its phrases, in the form of `extract_phrases`."""
    descriptions = [describe_object(obj) for obj in scene]
    sentences = [f"{description.capitalize()} lies in the {quarter} corner"
                 for description, quarter in zip(descriptions, QUARTERS, strict=True)]
    return sentences, [[[description], [], []] for description in descriptions]


def draw_scene(scene: list[dict]) -> Image.Image:
    """The picture of a scene."""
    picture = Image.new("RGB", (PICTURE_PIXELS, PICTURE_PIXELS), "gray")
    y, x = np.mgrid[:CARD_PIXELS, :CARD_PIXELS]
    for quarter, obj in enumerate(scene):
        tile = Image.new("RGB", (CARD_PIXELS, CARD_PIXELS), obj["card"])
        tile.paste("black", mask=Image.fromarray(np.uint8(255 * TEXTURES[obj["texture"]](x, y))))
        circle = (CARD_PIXELS / 2, CARD_PIXELS / 2, 12)  # centre and radius
        corners, rotation = SHAPES[obj["shape"]]
        ImageDraw.Draw(tile).regular_polygon(circle, corners, rotation, fill=obj["colour"])
        picture.paste(tile, (CARD_PIXELS * (quarter % 2), CARD_PIXELS * (quarter // 2)))
    return picture


def build_scenes_tokenizer() -> CLIPTokenizer:
    """A tokenizer, without a download: a token for each word of the scenes, bytes for all else."""
    words = set()
    for index in range(300):  # together they have all words
        words.update(" ".join(describe_scene(make_scene("train", index))[0]).lower().split())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    tokenizer.add_tokens([AddedToken(word, single_word=True) for word in sorted(words)])
    return straighten_quotes(tokenizer)
