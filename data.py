"""Images, queries and batches: what a training step is fed (paper, section 4).

A sample is an image and its queries, [(text, level)]: the caption, its sentences, its phrases. `Captions`
reads whatever `datasets` reads; `Scenes`, last in this file, paints its own pictures.
"""

import argparse
import contextlib
import functools
import io
import itertools
import math
import os
import random
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageDraw
from tokenizers import AddedToken, pre_tokenizers
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize
from tqdm import tqdm
from transformers import CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

TOKEN_LIMITS = {"caption": 248, "sentence": 248, "phrase": 30}  # of a query, by its level (see make_queries)
LEVELS = tuple(TOKEN_LIMITS)                                    # a batch's `level` counts in this order
QUOTES = str.maketrans("’‘“”", "''\"\"")  # OpenAI's tokenizer straightens them, Hugging Face's does not
CAPTION_SENTENCES = 5  # sentences that make a caption where no sentence is a query
SHAREGPT4V = "share-captioner_coco_lcs_sam_1246k_1107.json"
HELD_OUT = 1000        # first rows of ShareGPT4V, which are the test set SV-1k
UNREADABLE = (OSError, ValueError, TypeError, AttributeError, SyntaxError, RuntimeError,
              Image.DecompressionBombError)  # what PIL raises of images, and Python of none

class InputError(ValueError):
    """Something that the user can mend; its message says what is wrong, where, and what to do."""

@contextlib.contextmanager
def user_errors():
    """What the user can mend ends the program with one line on stderr and exit code 2."""
    try:
        yield
    except (InputError, OSError) as error:
        tqdm.write(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())[:600]}", file=sys.stderr)
        raise SystemExit(2) from error

def argument_parser(description):
    """An argparse parser whose errors are one line."""
    return argparse.ArgumentParser(description=description, usage=argparse.SUPPRESS,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)

# ---------------------------------------------------------------------------------- captions to queries
def clean(caption):
    """A caption without what captioners repeat: runs of the same characters, and of the same word."""
    caption = caption.replace("\n", " ")
    if len(caption) > 100:
        for shortest in (10, 5, 3):  # three or more copies of the same run of characters
            caption = re.sub(rf"(.{{{shortest},20}})\1{{2,}}", r"\1", caption, count=10)
    return " ".join(word for word, _ in itertools.groupby(caption.split()))

def split_sentences(caption):
    return [sentence.strip() for sentence in caption.split(". ") if sentence.strip()]

def phrase_matchers(vocab):
    """spaCy matchers of noun phrases with a place, of actions, and of places."""
    from spacy.matcher import Matcher
    sides = "left right top bottom front back middle center".split()
    others = "inside outside above below under over centered frontside backside near nearby far".split()
    side, place = {"LOWER": {"IN": sides}}, {"LOWER": {"IN": sides + others}}
    determiner, the, of = {"POS": "DET", "OP": "?"}, {"LOWER": "the", "OP": "?"}, {"LOWER": "of", "OP": "?"}
    words, preposition = {"POS": {"IN": ["ADJ", "NOUN", "PROPN"]}, "OP": "+"}, {"POS": "ADP"}
    nouns, actions, places = Matcher(vocab), Matcher(vocab), Matcher(vocab)
    nouns.add("phrase", [[determiner, words, preposition, the, side, of]], greedy="LONGEST")
    actions.add("phrase", [[{"POS": "VERB"}, preposition]], greedy="LONGEST")
    next_to = [{"LOWER": "next", "POS": "ADV"}, {"LOWER": "to", "POS": "ADP"}]
    places.add("phrase", [next_to, [preposition, determiner, place, of]], greedy="LONGEST")
    return nouns, actions, places

def extract_phrases(doc, matchers):
    """A parsed sentence (spaCy Doc) -> its noun phrases, actions and places, three lists of str."""
    from spacy.util import filter_spans
    nouns, actions, places = (matcher(doc, as_spans=True) for matcher in matchers)
    nouns = filter_spans([*doc.noun_chunks, *nouns])  # the longest of overlapping ones
    return [[span.text for span in nouns], [span.text for span in sorted(actions)],
            [span.text.lower() for span in sorted(places)]]

def order_phrases(sentences):
    """What `extract_phrases` gave for some sentences -> one list: noun phrases, then actions, then places."""
    phrases = [phrase for kind in zip(*sentences) for sentence in kind for phrase in sentence]
    return [phrase for phrase in dict.fromkeys(phrases) if phrase not in ("the", "image", "the image")]

@functools.cache
def parser():
    """spaCy's English pipeline and the matchers of phrases."""
    try:
        import spacy
        nlp = spacy.load("en_core_web_sm", exclude=["ner", "lemmatizer"])
    except (ImportError, OSError) as error:
        raise InputError("phrases need spaCy and its English model: `pip install spacy && python -m spacy "
                         "download en_core_web_sm`, or pass --phrases 0") from error
    return nlp, phrase_matchers(nlp.vocab)

def parse(sentences):
    """Sentences -> for each, what `extract_phrases` finds. With a full stop, as the parser expects one."""
    nlp, matchers = parser()
    texts = (sentence.removesuffix(".") + "." for sentence in sentences)
    return [extract_phrases(doc, matchers) for doc in nlp.pipe(texts, batch_size=256)]

def draw_sentences(count, wanted, rng):
    """Positions of one draw of sentences: `wanted` of `count` in random order; all, in order, if no more."""
    wanted = wanted or CAPTION_SENTENCES
    return rng.sample(range(count), wanted) if count > wanted else range(count)

def make_queries(sentences, phrases, counts):
    """Drawn sentences and their phrases, at most `counts` of each -> a sample's queries, [(text, level)]."""
    queries = [(". ".join(sentences), "caption")]
    if counts[0]:
        queries += [(sentence, "sentence") for sentence in sentences]
    return queries + [(phrase, "phrase") for phrase in phrases[:counts[1]]]

# ------------------------------------------------------------------------ captions and images on disk
def read_rows(source, columns=None, splits=("train",)):
    """A JSON, JSON lines or parquet file (or a glob), a folder, a hub name -> datasets.Dataset, the names of
    its columns of images (undecoded) and captions. The first of `splits` that is there is read, or else any.
    """
    import datasets  # slow, and not needed for the scenes
    kind = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}.get(Path(source).suffix)
    if not kind and not Path(source).is_dir() and str(source).count("/") != 1:
        raise InputError(f"{source}: no .json, .jsonl or .parquet file, no folder, no hub name (OWNER/NAME)")
    try:
        found = datasets.load_dataset(kind or str(source), data_files=str(source) if kind else None)
        rows = found[next(split for split in [*splits, *found] if split in found)]
        if "annotations" in rows.column_names:
            rows = datasets.load_dataset(kind, data_files=str(source), field="annotations", split="train")
        default = "image,conversations" if "conversations" in rows.column_names else "image,caption"
        image, _, caption = (columns or default).partition(",")
        if missing := {image, caption} - {*rows.column_names}:
            raise ValueError(f"no column {' or '.join(sorted(missing))}, but {', '.join(rows.column_names)}: "
                             "name yours with --columns IMAGE,CAPTION")
        if getattr(rows.features[image], "dtype", "") not in ("string", "large_string"):
            rows = rows.cast_column(image, datasets.Image(decode=False))
        elif "://" in str(rows[0][image]):
            raise ValueError(f"{image!r} must hold images, or names of files, no {rows[0][image]}")
        captions_of(rows[0][caption])
    except Exception as error:  # the errors of datasets, pyarrow and the hub have no ancestor in common
        why = str(error.__cause__ or error) or type(error).__name__
        raise InputError(f"{source} cannot be read: {why}") from error
    return rows, image, caption

def captions_of(value):
    """A value of the caption column, a text, several or a conversation -> its captions, a list of str."""
    if not isinstance(value, (str, list, type(None))):
        raise InputError(f"captions must be texts, or lists of texts, but one is {value}")
    texts = [value] if isinstance(value, str) else value or []
    answers = [turn["value"] for turn in texts if isinstance(turn, dict) and turn["from"] == "gpt"]
    return answers[:1] or [text for text in texts if isinstance(text, str) and text.strip()]

def split_captions(batch, indices, column, with_phrases):
    """Columns of rows -> row (index), sentences [C][S], phrases [C][S][kind] of rows with C > 0 captions."""
    kept = []  # (index, captions, phrases that the row brings; these go with each of its sentences)
    for index, value, given in zip(indices, batch[column], batch.get("phrases", [None] * len(indices))):
        captions = [split_sentences(clean(caption)) for caption in captions_of(value)]
        if any(captions):
            kept.append((index, [sentences for sentences in captions if sentences], given))
    unparsed = [s for _, captions, given in kept if given is None for s in itertools.chain(*captions)]
    parsed = dict(zip(unparsed, parse(unparsed))) if unparsed and with_phrases else {}
    phrases = [[[parsed.get(sentence, [given or [], [], []]) for sentence in caption] for caption in captions]
               for _, captions, given in kept]
    rows, sentences = [index for index, *_ in kept], [captions for _, captions, _ in kept]
    return {"row": rows, "sentences": sentences, "phrases": phrases}

class Captions:
    """Images and captions on disk: (epoch, index) -> pixels uint8 [3, size, size], queries, unreadable."""

    def __init__(self, source, root, size, counts=(5, 30), seed=0, columns=None):
        import datasets
        rows, self.image, caption = read_rows(source, columns)
        if Path(source).name == SHAREGPT4V:
            rows = rows.select(range(HELD_OUT, len(rows)))
        self.rows, self.root, self.size, self.counts, self.seed = rows, root, size, counts, seed
        columns = [name for name in (caption, "phrases") if name in rows.column_names]
        settings, text = {"column": caption, "with_phrases": counts[1] > 0}, datasets.Value("string")
        features = datasets.Features(row=datasets.Value("int64"), sentences=[[text]], phrases=[[[[text]]]])
        # once for these rows, settings and this file: the first process works, the others wait for its cache
        key = datasets.fingerprint.Hasher.hash((rows._fingerprint, settings, Path(__file__).read_bytes()))
        with FileLock(Path(datasets.config.HF_DATASETS_CACHE, f"beta_clip_{key}.lock")):
            self.captions = rows.select_columns(columns).map(
                split_captions, fn_kwargs=settings, with_indices=True, batched=True, remove_columns=columns,
                features=features, new_fingerprint=key, desc="captions to queries",
                num_proc=min(len(os.sched_getaffinity(0)), len(rows) // 1000) or None)

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, position):
        rng, index, unreadable = random.Random(f"{self.seed} {position}"), position[1], []
        pixels = torch.zeros(3, self.size, self.size, dtype=torch.uint8)
        for _ in range(20):  # another sample for an unreadable image; if all are, their count ends the run
            sample = self.captions[index]
            image = self.rows[sample["row"]][self.image]
            try:
                with open_image(image, self.root) as opened:
                    pixels = random_crop(opened, self.size, rng)
                break
            except UNREADABLE as error:
                unreadable.append(f"{image['path'] if isinstance(image, dict) else image}: {error}")
                index = rng.randrange(len(self))
        sentences, phrases = rng.choice(list(zip(sample["sentences"], sample["phrases"])))
        drawn = draw_sentences(len(sentences), self.counts[0], rng)
        sentences, phrases = [sentences[i] for i in drawn], order_phrases([phrases[i] for i in drawn])
        return pixels, make_queries(sentences, phrases, self.counts), unreadable

# ----------------------------------------------------------------------------------------------- images
def open_image(image, root):
    """A value of the image column, a name under `root` or {"bytes", "path"} -> PIL image, not decoded yet."""
    if isinstance(image, dict):  # `datasets` found it, or it came with its bytes
        return Image.open(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"])
    if Path(image).is_absolute() or ".." in Path(image).parts:
        raise ValueError(f"{image!r} leads out of {root}")
    return Image.open(Path(root, image))

def rgb(image):
    """Any PIL image -> RGB, of an animation the first frame; 16 bits, which PIL clips, are scaled."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) / 256).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")

def to_pixels(image, size, whole=False):
    """A PIL image -> pixels uint8 [3, size, size]: its centre, or the whole, aspect ignored (FG-OVD)."""
    image = rgb(image)
    image = image.resize((size, size)) if whole else resize(image, size, Image.Resampling.BICUBIC)
    return pil_to_tensor(center_crop(image, size))

def random_crop(image, size, rng):
    """A PIL image, best not decoded -> pixels uint8 [3, size, size], RandomResizedCrop, scale (0.5, 1)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.getrandbits(63))
        top, left, height, width = RandomResizedCrop.get_params(image, (0.5, 1), (3 / 4, 4 / 3))
    full = image.size
    # a JPEG is decoded at the smallest scale (1, 1/2, 1/4, 1/8) that still has `size` pixels across the crop
    image.draft("RGB", (math.ceil(full[0] * size / width), math.ceil(full[1] * size / height)))
    x, y = image.size[0] / full[0], image.size[1] / full[1]
    box = (left * x, top * y, (left + width) * x, (top + height) * y)
    return pil_to_tensor(rgb(image).resize((size, size), Image.Resampling.BILINEAR, box))

def normalize(pixels):
    """uint8 pixels [B, 3, H, W] -> float32, by CLIP's mean and standard deviation."""
    statistics = torch.tensor([OPENAI_CLIP_MEAN, OPENAI_CLIP_STD]).view(2, 3, 1, 1)
    mean, std = statistics.to(pixels.device, non_blocking=True)
    return (pixels.float() / 255 - mean) / std

# ----------------------------------------------------------------------------------- samples to batches
def tokenize(tokenizer, texts, limits=itertools.repeat(TOKEN_LIMITS["caption"])):
    """Texts -> lists of token ids, BOS … EOS. One longer than its limit is cut so that EOS stays its last."""
    encoded = tokenizer.backend_tokenizer.encode_batch_fast([text.translate(QUOTES) for text in texts])
    ids = [one.ids for one in encoded]
    return [one if len(one) <= limit else one[:limit - 1] + one[-1:] for one, limit in zip(ids, limits)]

class Batch(NamedTuple):
    """B images and their N queries."""
    pixels: torch.Tensor    # [B, 3, H, W] uint8
    texts: tuple            # the queries' tokens, as `pack` lays them out
    owner: torch.Tensor     # [N] the image of each query, sorted; stays on the CPU, where the host reads it
    level: torch.Tensor     # [N] the level of each query, as in LEVELS
    captions: torch.Tensor  # [B] the row of each image's caption
    unreadable: list        # names of images, and why

    def to(self, device):
        moved = {name: getattr(self, name).to(device, non_blocking=True)
                 for name in ("pixels", "level", "captions")}
        return self._replace(texts=self.texts.to(device), **moved)

def collate(samples, tokenizer, pack, captions_only=False):
    """A list of samples -> Batch, in a loader's process. `pack` (model.pack) lays out token ids."""
    pixels, queries, unreadable = zip(*samples)
    queries = [sample[:1] if captions_only else sample for sample in queries]
    texts, levels = zip(*itertools.chain(*queries))
    counts = torch.tensor([len(sample) for sample in queries])                       # [B]
    ids = tokenize(tokenizer, texts, [TOKEN_LIMITS[level] for level in levels])
    return Batch(torch.stack(pixels), pack(ids), owner=torch.arange(len(samples)).repeat_interleave(counts),
                 level=torch.tensor([LEVELS.index(level) for level in levels]),
                 captions=counts.cumsum(0) - counts, unreadable=sum(unreadable, []))

def batches(size, batch, start, stop, rank=0, world=1, seed=0):
    """One rank's batches, lists of (epoch, index): images `start` to `stop` of a stream that all ranks share,
    the data set shuffled anew each epoch. A micro-step takes the next `world` x `batch` of it.
    """
    shuffled = functools.lru_cache(1)(lambda epoch: np.random.default_rng([seed, epoch]).permutation(size))
    for first in range(start + rank * batch, stop, world * batch):
        places = [divmod(place, size) for place in range(first, first + batch)]
        yield [(epoch, int(shuffled(epoch)[place])) for epoch, place in places]

# ----------------------------------------------------------------------------------------------- scenes
# Learned in minutes: each attribute fills patches of its own. Objects are many (3,456), so seldom twice in a
# batch (a false negative); backgrounds are few, as a model that tells images by them ignores the objects.
SIZE, CARD = 64, 29  # pixels of a picture's side, of which a quarter holds a card, and of the card's
SIDE = {"small": 13, "large": 23}  # pixels of an object on its card
SPLITS = {"train": 80_000, "val": 1_000, "test": 1_000}
SIBLINGS = 4  # val and test scenes come in groups that differ in one attribute of one object
COLOURS = {"red": (220, 40, 40), "orange": (245, 140, 30), "yellow": (245, 225, 50), "green": (50, 170, 60),
           "cyan": (60, 210, 220), "blue": (45, 80, 220), "purple": (140, 50, 190), "pink": (250, 150, 195),
           "white": (250, 250, 250)}
BACKGROUNDS = {"slate": (90, 100, 115), "sand": (200, 185, 150), "moss": (115, 130, 90), "coal": (60, 60, 65)}
y, x = np.mgrid[:CARD, :CARD]
TEXTURES = {"plain": x < 0, "striped": (y + 3) % 5 < 2, "dotted": ((x + 4) % 5 < 2) & ((y + 4) % 5 < 2),
            "checkered": (x // 4 + y // 4) % 2 > 0}  # where a card is dark
ATTRIBUTES = {"size": [*SIDE], "colour": [*COLOURS], "texture": [*TEXTURES], "card": [*COLOURS]}
SHAPES = {  # outlines in the unit square; of the circle, the corners of its box
    "circle": [(0, 0), (1, 1)],
    "square": [(.08, .08), (.92, .08), (.92, .92), (.08, .92)],
    "triangle": [(.5, 0), (1, .95), (0, .95)],
    "cross": [(.3, 0), (.7, 0), (.7, .3), (1, .3), (1, .7), (.7, .7), (.7, 1), (.3, 1), (.3, .7), (0, .7),
              (0, .3), (.3, .3)],
    "star": [(.5 + r * math.sin(k * math.pi / 5), .5 - r * math.cos(k * math.pi / 5))
             for k, r in enumerate((.55, .25) * 5)],
    "arrow": [(.5, 0), (1, .5), (.72, .5), (.72, 1), (.28, 1), (.28, .5), (0, .5)],
}
PLACES = ("top left", "top right", "bottom left", "bottom right")

def scene(split, index):
    """A scene: {"objects": four, in the order of PLACES, "background": its name}. An object has ATTRIBUTES,
    `shape` and `box` (x, y, w, h in pixels). Of a group of SIBLINGS, the first is the original.
    """
    group, member = (index, 0) if split == "train" else divmod(index, SIBLINGS)
    rng, objects = random.Random(f"{split} {group}"), []
    for place in range(4):
        thing = {name: rng.choice(values) for name, values in (ATTRIBUTES | {"shape": [*SHAPES]}).items()}
        while thing["card"] == thing["colour"]:
            thing["card"] = rng.choice(ATTRIBUTES["card"])
        x, y = (round(rng.random() * (SIZE // 2 - CARD)) for _ in "xy")
        thing["box"] = (x + SIZE // 2 * (place % 2), y + SIZE // 2 * (place // 2), CARD, CARD)
        objects.append(thing)
    if member:
        changes = [(place, other) for place in range(4) for other in changed(objects[place], 1)]
        changes = random.Random(f"{split} {group} siblings").sample(changes, SIBLINGS - 1)
        place, objects[place] = changes[member - 1]
    return {"objects": objects, "background": rng.choice([*BACKGROUNDS])}

def changed(thing, count):
    """All objects that differ from `thing` in exactly `count` ATTRIBUTES (the shape stays, as in FG-OVD)."""
    for names in itertools.combinations(ATTRIBUTES, count):
        for values in itertools.product(*([v for v in ATTRIBUTES[n] if v != thing[n]] for n in names)):
            other = thing | dict(zip(names, values))
            if other["card"] != other["colour"]:
                yield other

def expression(thing):
    """The phrase that says everything of an object: "a large red star on a striped orange card"."""
    return "a {size} {colour} {shape} on a {texture} {card} card".format(**thing)

def describe(scene):
    """A scene's sentences (list of 6 str) and phrases (list of 8 str), not yet drawn from."""
    objects = scene["objects"]
    name = [f"the {o['colour']} {o['shape']}" for o in objects]
    sentences = [f"{expression(o).capitalize()} lies in the {p} corner" for o, p in zip(objects, PLACES)]
    sentences += [f"Here {name[0]} is above {name[2]} and {name[1]} is to the right of it above {name[3]}",
                  f"Behind all of them there is nothing but a plain {scene['background']} background"]
    shorter = ["a {size} {colour} {shape} on a {texture} card".format(**o) for o in objects]
    return sentences, [expression(o) for o in objects] + shorter

def paint(scene):
    """The scene as a PIL image of SIZE x SIZE."""
    image = Image.new("RGB", (SIZE, SIZE), BACKGROUNDS[scene["background"]])
    for thing in scene["objects"]:
        dark, side = TEXTURES[thing["texture"]][:, :, None], SIDE[thing["size"]]
        card = Image.fromarray(np.where(dark, (25, 25, 30), COLOURS[thing["card"]]).astype(np.uint8))
        first = (CARD - side) // 2
        outline = [(first + x * (side - 1), first + y * (side - 1)) for x, y in SHAPES[thing["shape"]]]
        pen = ImageDraw.Draw(card)
        (pen.ellipse if thing["shape"] == "circle" else pen.polygon)(outline, fill=COLOURS[thing["colour"]])
        image.paste(card, thing["box"][:2])
    return image

def scene_boxes(split):
    """FG-OVD's rows, dicts: `image` (which original), `box`, for each level 11 texts, the positive first."""
    rows, originals = [], [scene(split, i)["objects"] for i in range(0, SPLITS[split], SIBLINGS)]
    for group, objects in enumerate(originals):
        foreign = {expression(o) for i in (1, 2, 3, 4) for o in originals[(group + i) % len(originals)]}
        for place, thing in enumerate(objects):
            rng, positive = random.Random(f"boxes {group * SIBLINGS} {place}"), expression(thing)
            row = {"image": group, "box": thing["box"]}
            for level, name in enumerate(("hard", "medium", "easy"), start=1):
                row[name] = [positive, *map(expression, rng.sample(list(changed(thing, level)), 10))]
            row["trivial"] = [positive, *rng.sample(sorted(foreign - {positive}), 10)]
            rows.append(row)
    return rows

def scenes_tokenizer():
    """A CLIPTokenizer that has each word of the scenes as one token, and bytes for all else (no hub)."""
    texts = [text for index in range(300) for text in sum(describe(scene("train", index)), [])]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    words = sorted({word for text in texts for word in text.lower().split()})
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in words])
    return tokenizer

class Scenes:
    """The training scenes, which no file holds: (epoch, index) -> a sample, as `Captions` gives it."""

    def __init__(self, size, counts=(5, 8), seed=0):
        self.size, self.counts, self.seed = size, counts, seed

    def __len__(self):
        return SPLITS["train"]

    def __getitem__(self, position):
        chosen, rng = scene("train", position[1]), random.Random(f"{self.seed} {position}")
        sentences, phrases = describe(chosen)
        sentences = [sentences[i] for i in draw_sentences(len(sentences), self.counts[0], rng)]
        return to_pixels(paint(chosen), self.size), make_queries(sentences, phrases, self.counts), []
