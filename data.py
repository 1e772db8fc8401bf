"""Images, queries and tokens: what a step of training eats (SPEC §5).

A sample is an image and its queries: caption, sentences, phrases. `Captions` reads ShareGPT4V, or any file of
images and captions. `Scenes` draws its own: four objects, each of a size and a colour on a card of a texture and
another colour, with a long caption, its sentences, its phrases and a box per object; no file is on disk.
"""

import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import random
import re
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import pre_tokenizers
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import InterpolationMode, center_crop, resize
from tqdm import tqdm
from transformers import CLIPTokenizer

CONTEXT = 248        # tokens of a text, at most
PHRASE_TOKENS = 30   # tokens of a phrase, at most
QUOTES = str.maketrans("’‘“”", "''\"\"")  # OpenAI's tokenizer straightens them, Hugging Face's does not (SPEC §5)
DRAWN = 5            # sentences that make a caption where no sentence is a query
HELD_OUT = 1000      # first rows of ShareGPT4V, which are the test set SV-1k
SHAREGPT4V = "share-captioner_coco_lcs_sam_1246k_1107.json"


def fail(message):
    """End the program with one line on stderr and exit code 2."""
    tqdm.write(" ".join([f"{Path(sys.argv[0]).name}:", *str(message).splitlines()]), file=sys.stderr)  # not into a bar's line
    raise SystemExit(2)


def reason(error):
    """What an exception says, 300 characters at most, with its kind where what it says may be no sentence."""
    return ("" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: ") + str(error)[:300]


# ---------------------------------------------------------------------------------------------- scenes

# Made so that a small model learns it in minutes: each attribute fills patches of its own, and there are 3,456
# different objects, so that a phrase seldom stands twice in a batch, where it would be a false negative.
SIZE = 64   # pixels; four cells of 32
CARD = 29   # pixels
SIDE = {"small": 13, "large": 23}  # pixels of an object on its card
SPLITS = {"train": 80_000, "test": 1_000}
SIBLINGS = 4  # test scenes come in groups that differ in one attribute of one object

COLOURS = {
    "red": (220, 40, 40), "orange": (245, 140, 30), "yellow": (245, 225, 50), "green": (50, 170, 60),
    "cyan": (60, 210, 220), "blue": (45, 80, 220), "purple": (140, 50, 190), "pink": (250, 150, 195),
    "white": (250, 250, 250),
}
# few, and plain: a background that tells images apart is learned first, and then nothing asks for the objects
BACKGROUNDS = {"slate": (90, 100, 115), "sand": (200, 185, 150), "moss": (115, 130, 90), "coal": (60, 60, 65)}
ATTRIBUTES = {
    "size": ("small", "large"),
    "colour": tuple(COLOURS),
    "texture": ("plain", "striped", "dotted", "checkered"),
    "card": tuple(COLOURS),
}
SHAPES = {  # outlines in the unit square; the circle is drawn as an ellipse
    "circle": None,
    "square": [(.08, .08), (.92, .08), (.92, .92), (.08, .92)],
    "triangle": [(.5, 0), (1, .95), (0, .95)],
    "cross": [(.3, 0), (.7, 0), (.7, .3), (1, .3), (1, .7), (.7, .7), (.7, 1), (.3, 1), (.3, .7), (0, .7), (0, .3), (.3, .3)],
    "star": [(.5 + r * math.sin(k * math.pi / 5), .5 - r * math.cos(k * math.pi / 5)) for k in range(10) for r in [(.55, .25)[k % 2]]],
    "arrow": [(.5, 0), (1, .5), (.72, .5), (.72, 1), (.28, 1), (.28, .5), (0, .5)],
}
PLACES = ("top left", "top right", "bottom left", "bottom right")


def scene(split, index):
    """The scene at (split, index): a dict of plain values.

    `objects`: four dicts of the ATTRIBUTES, `shape`, and `box` (x, y, w, h) in pixels, in the order of PLACES;
    `background`: its name. In `test`, index // SIBLINGS is the group; its first member is the original, each
    other one changes one attribute of one object.
    """
    group, member = (index // SIBLINGS, index % SIBLINGS) if split == "test" else (index, 0)
    rng = random.Random(f"{split} {group}")
    objects = []
    for place in range(4):
        thing = {name: rng.choice(values) for name, values in ATTRIBUTES.items()} | {"shape": rng.choice(tuple(SHAPES))}
        while thing["card"] == thing["colour"]:
            thing["card"] = rng.choice(ATTRIBUTES["card"])
        thing["corner"] = (rng.random(), rng.random())
        objects.append(thing)
    background = rng.choice(tuple(BACKGROUNDS))
    if member:
        changes = [(place, other) for place in range(4) for other in changed(objects[place], 1)]
        place, other = random.Random(f"{split} {group} siblings").sample(changes, SIBLINGS - 1)[member - 1]
        objects[place] = other
    for place, thing in enumerate(objects):
        x, y = (round(at * (SIZE // 2 - CARD)) for at in thing["corner"])
        thing["box"] = (x + SIZE // 2 * (place % 2), y + SIZE // 2 * (place // 2), CARD, CARD)
    return {"objects": objects, "background": background}


def changed(thing, count):
    """All objects that differ from `thing` in exactly `count` of the ATTRIBUTES (the shape stays, as in FG-OVD)."""
    for names in itertools.combinations(ATTRIBUTES, count):
        for values in itertools.product(*([v for v in ATTRIBUTES[n] if v != thing[n]] for n in names)):
            other = thing | dict(zip(names, values))
            if other["card"] != other["colour"]:
                yield other


def expression(thing):
    """The phrase that says everything of an object: "a large red star on a striped orange card"."""
    return f"a {thing['size']} {thing['colour']} {thing['shape']} on a {thing['texture']} {thing['card']} card"


def describe(scene):
    """A scene's sentences (list of 6 str) and phrases (list of 8 str), not yet sampled."""
    objects = scene["objects"]
    name = [f"the {o['colour']} {o['shape']}" for o in objects]
    sentences = [f"{expression(o).capitalize()} lies in the {place} corner" for place, o in zip(PLACES, objects)]
    sentences += [f"Here {name[0]} is above {name[2]} and {name[1]} is to the right of it above {name[3]}",
                  f"Behind all of them there is nothing but a plain {scene['background']} background"]
    phrases = [expression(o) for o in objects]
    phrases += [f"a {o['size']} {o['colour']} {o['shape']} on a {o['texture']} card" for o in objects]
    return sentences, phrases


def draw(scene):
    """The scene as a PIL image of SIZE x SIZE."""
    image = Image.new("RGB", (SIZE, SIZE), BACKGROUNDS[scene["background"]])
    for thing in scene["objects"]:
        x, y, *_ = thing["box"]
        card = Image.new("RGB", (CARD, CARD), COLOURS[thing["card"]])
        pen, dark = ImageDraw.Draw(card), (25, 25, 30)
        if thing["texture"] == "striped":
            for at in range(2, CARD, 5):
                pen.rectangle((0, at, CARD, at + 1), fill=dark)
        elif thing["texture"] == "dotted":
            for u, v in itertools.product(range(1, CARD, 5), repeat=2):
                pen.rectangle((u, v, u + 1, v + 1), fill=dark)
        elif thing["texture"] == "checkered":
            for u, v in itertools.product(range(0, CARD, 4), repeat=2):
                if (u + v) % 8:
                    pen.rectangle((u, v, u + 3, v + 3), fill=dark)
        side = SIDE[thing["size"]]
        left = (CARD - side) // 2
        if thing["shape"] == "circle":
            pen.ellipse((left, left, left + side - 1, left + side - 1), fill=COLOURS[thing["colour"]])
        else:
            outline = [(left + u * (side - 1), left + v * (side - 1)) for u, v in SHAPES[thing["shape"]]]
            pen.polygon(outline, fill=COLOURS[thing["colour"]])
        image.paste(card, (x, y))
    return image


def scene_boxes():
    """FG-OVD's protocol on the objects of the original test scenes.

    Returns a list of dicts: `image` (index into the test split), `box` (x, y, w, h) in pixels, and, for each of
    hard, medium, easy and trivial, 11 expressions, the positive first.
    """
    rows, count = [], SPLITS["test"] // SIBLINGS
    for group in range(count):
        index = group * SIBLINGS
        foreign = [o for g in (1, 2, 3, 4) for o in scene("test", (group + g) % count * SIBLINGS)["objects"]]
        for place, thing in enumerate(scene("test", index)["objects"]):
            rng = random.Random(f"boxes {index} {place}")
            row = {"image": index, "box": thing["box"]}
            for level, split in enumerate(("hard", "medium", "easy"), start=1):
                row[split] = [expression(o) for o in [thing, *rng.sample(list(changed(thing, level)), 10)]]
            others = sorted({expression(o) for o in foreign} - {expression(thing)})
            row["trivial"] = [expression(thing), *rng.sample(others, 10)]
            rows.append(row)
    return rows


def scenes_tokenizer():
    """A CLIPTokenizer that has each word of the scenes as one token, and bytes for all else (no hub)."""
    texts = [text for index in range(300) for text in sum(describe(scene("train", index)), [])]
    words = sorted({word for text in texts for word in text.lower().split()})
    merges = {}  # pair: rank
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:  # merge what BPE would merge next; where it would stop, teach it one merge more
            pairs = list(zip(pieces, pieces[1:]))
            pair = min(pairs, key=lambda pair: merges.get(pair, math.inf))
            merges.setdefault(pair, len(merges))
            at = pairs.index(pair)
            pieces[at:at + 2] = ["".join(pair)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=list(merges))


class Scenes:
    """The training scenes: (epoch, index) -> an image's pixels [3, size, size] and its queries, as of `queries`."""

    def __init__(self, size, sentences, phrases, seed=0, captions_only=False):
        self.size, self.sentences, self.phrases, self.seed, self.captions_only = size, sentences, phrases, seed, captions_only

    def __len__(self):
        return SPLITS["train"]

    def __getitem__(self, at):
        one = scene("train", at[1])
        sentences, phrases = describe(one)
        drawn = draw_sentences(len(sentences), self.sentences, random.Random(f"{self.seed} {at}"))
        return to_pixels(draw(one), self.size), *queries([sentences[i] for i in drawn], phrases, self), []


# ------------------------------------------------------------------------------------ captions to queries

PLACE_NOUNS = ("left", "right", "top", "bottom", "front", "back", "middle", "center")
PLACE_HEADS = (*PLACE_NOUNS, "inside", "outside", "above", "below", "under", "over", "centered", "frontside", "backside",
               "near", "nearby", "far")


def clean(caption):
    """A caption without what captioners repeat (SPEC §5.1, §5.2)."""
    caption = caption.replace("\n", " ")
    if len(caption) > 100:
        for shortest in (10, 5, 3):  # three or more copies of the same run of characters
            caption = re.sub(rf"(.{{{shortest},20}})\1{{2,}}", r"\1", caption, count=10)
    return " ".join(word for word, _ in itertools.groupby(caption.split()))


def split_sentences(caption):
    """A clean caption -> its sentences (SPEC §5.3)."""
    return [sentence.strip() for sentence in caption.split(". ") if sentence.strip()]


def phrase_matchers(vocab):
    """spaCy matchers of noun phrases with a place, of actions, and of places (SPEC §5.5)."""
    from spacy.matcher import Matcher
    determiner, the, of = {"POS": "DET", "OP": "?"}, {"LOWER": "the", "OP": "?"}, {"LOWER": "of", "OP": "?"}
    words = {"POS": {"IN": ["ADJ", "NOUN", "PROPN"]}, "OP": "+"}
    patterns = (
        [[determiner, words, {"POS": "ADP"}, the, {"LOWER": {"IN": list(PLACE_NOUNS)}}, of]],
        [[{"POS": "VERB"}, {"POS": "ADP"}]],
        [[{"LOWER": "next"}, {"LOWER": "to"}], [{"POS": "ADP"}, determiner, {"LOWER": {"IN": list(PLACE_HEADS)}}, of]],
    )
    matchers = [Matcher(vocab) for _ in patterns]
    for matcher, alternatives in zip(matchers, patterns):
        matcher.add("phrase", alternatives, greedy="LONGEST")
    return matchers


def extract_phrases(doc, matchers):
    """A parsed sentence (spaCy Doc) -> its noun phrases, actions and places, three lists of str (SPEC §5.5)."""
    from spacy.util import filter_spans
    nouns, actions, places = (matcher(doc, as_spans=True) for matcher in matchers)
    spans = filter_spans([*doc.noun_chunks, *nouns]), sorted(actions), sorted(places)  # the longest of overlapping ones
    return [[span.text for span in kind] for kind in spans]


def order_phrases(sentences):
    """Phrases of some sentences, as `extract_phrases` gives them -> one list: all noun phrases, all actions, all places."""
    phrases = [phrase for kind in zip(*sentences) for sentence in kind for phrase in sentence]
    return [phrase for phrase in dict.fromkeys(phrases) if phrase not in ("the", "image", "the image")]


@functools.cache
def parser():
    """spaCy's English pipeline and the matchers of phrases."""
    try:
        import spacy
        nlp = spacy.load("en_core_web_sm", exclude=["ner", "lemmatizer"])
    except (ImportError, OSError):
        fail("phrases need spaCy and its English model: `pip install spacy && python -m spacy download en_core_web_sm`, or pass --phrases 0")
    return nlp, phrase_matchers(nlp.vocab)


# --------------------------------------------------------------------------------- annotation files

def rows(path):
    """The rows (dicts) of a JSON list or of JSON lines, one by one, as (where, row); in memory is a part of the file, not all.

    `where` names file and row, counted from 1. A broken file ends the program with one line. Of a key that is there
    twice the last counts; half a surrogate pair, which is no text, becomes "?".
    """
    if not os.path.isfile(path):
        fail(f"{path}: there is no such file")
    decoder, between, number, more = json.JSONDecoder(), re.compile(r"[\s,]*"), 0, True
    try:
        with open(path, encoding="utf-8-sig") as file:
            buffer, at, listed = file.read(1 << 20), 0, False
            while True:
                at = between.match(buffer, at).end()
                if number == 0 and not listed and buffer[at:at + 1] == "[":
                    listed, at = True, at + 1
                    continue
                if listed and buffer[at:at + 1] == "]" or not (listed or buffer[at:] or more):
                    break
                try:
                    row, end = decoder.raw_decode(buffer, at)
                except (ValueError, RecursionError) as error:  # ValueError: of numbers with thousands of digits, too
                    if not more:
                        fail(f"{path}, row {number + 1}: broken JSON, cut off, or too deep ({error})")
                    more = file.read(max(1 << 20, len(buffer)))
                    buffer, at = buffer[at:] + more, 0
                    continue
                number += 1
                if not isinstance(row, dict):
                    fail(f"{path}, row {number}: must be an object, is {str(row)[:40]!r}")
                if "\\ud" in buffer[at:end].lower():
                    row = json.loads(json.dumps(row, ensure_ascii=False).encode(errors="replace"))
                at = end
                yield f"{path}, row {number}", row
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path}: {error}")
    if not number:
        fail(f"{path}: no rows in it")


def field(row, name, where, kind=str):
    """row[name], which must be there, of that kind, and not blank."""
    value = row.get(name)
    if not isinstance(value, kind) or kind is str and not value.strip():
        fail(f"{where}: {name!r} must be a {'text' if kind is str else kind.__name__}, is {str(value)[:40]!r}")
    return value


def objects(row, name, where):
    """The objects (dicts) in the list row[name], one by one, as (where, object)."""
    for number, one in enumerate(field(row, name, where, list), start=1):
        place = f"{where}, {name.removesuffix('s')} {number}"
        if not isinstance(one, dict):
            fail(f"{place}: must be an object, is {str(one)[:40]!r}")
        yield place, one


def inside(root, name, where):
    """root / name, which must not climb out of root."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        fail(f"{where}: {name!r} leads out of the root")
    return Path(root) / name


def annotations(path, held_out=False):
    """Rows of ShareGPT4V, or {"image", "caption"} and maybe "phrases" -> dicts of image, caption and phrases.

    ShareGPT4V's first HELD_OUT rows are the test set: these alone with `held_out`, all others without.
    """
    for number, (where, row) in enumerate(rows(path)):
        if "conversations" in row:
            if (number < HELD_OUT) != held_out:
                if held_out:
                    return
                continue
            row["caption"] = next((turn.get("value") for _, turn in objects(row, "conversations", where) if turn.get("from") == "gpt"), None)
        image, caption, phrases = field(row, "image", where), row.get("caption"), row.get("phrases")
        if not isinstance(caption, str):
            fail(f"{where}: 'caption' must be a text, is {str(caption)[:40]!r}")
        inside(".", image, where)
        if phrases is not None and not (isinstance(phrases, list) and all(isinstance(phrase, str) for phrase in phrases)):
            fail(f"{where}: 'phrases' must be a list of texts")
        yield dict(image=image, caption=caption, phrases=phrases)


def split_captions(batch, with_phrases):
    """Columns of `annotations` -> image, sentences (list of S str), phrases ([S][kind] lists of str; SPEC §5.1–5.5).

    A caption that is empty once cleaned is left out. Phrases that were given go with the sentences they stand in;
    one that stands in none goes with all.
    """
    kept = [(image, split_sentences(clean(caption)), given) for image, caption, given in zip(*(batch[k] for k in ("image", "caption", "phrases")))]
    kept = [one for one in kept if one[1]]
    parsed = iter(())
    if with_phrases and (unparsed := [sentence for _, sentences, given in kept if given is None for sentence in sentences]):
        nlp, matchers = parser()
        parsed = (extract_phrases(doc, matchers) for doc in nlp.pipe(unparsed, batch_size=256))
    phrases = []
    for _, sentences, given in kept:
        if given is None:
            phrases.append([next(parsed, [[], [], []]) for _ in sentences])
        else:
            astray = {phrase for phrase in given if not any(phrase in sentence for sentence in sentences)}
            phrases.append([[[phrase for phrase in given if phrase in sentence or phrase in astray], [], []] for sentence in sentences])
    return {"image": [one[0] for one in kept], "sentences": [one[1] for one in kept], "phrases": phrases}


def prepare(path, with_phrases):
    """An annotation file -> a datasets.Dataset of what `split_captions` makes of it, memory-mapped from the datasets cache.

    Made once for a file and this code: the first process to come works, the others wait and find it there.
    """
    import datasets
    from filelock import FileLock
    stat, text, cache = os.stat(path), datasets.Value("string"), Path(datasets.config.HF_DATASETS_CACHE)
    code = [inspect.getsource(part) for part in (annotations, split_captions, clean, split_sentences, phrase_matchers, extract_phrases)]
    made_of = [str(Path(path).resolve()), stat.st_size, stat.st_mtime_ns, with_phrases, code, PLACE_NOUNS, PLACE_HEADS]
    folder = cache / f"beta_clip_{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                if next(annotations(path), None) is None:
                    fail(f"{path}: no row to train on (ShareGPT4V's first {HELD_OUT} are the test set)")
                print(f"reading {path}", flush=True)
                datasets.disable_progress_bars()  # a complaint of a row stands in a line of its own
                raw = datasets.Dataset.from_generator(annotations, gen_kwargs={"path": str(path)}, fingerprint=folder.name,
                                                      features=datasets.Features(image=text, caption=text, phrases=[text]))
                if with_phrases and any(row["phrases"] is None and row["caption"].strip() for row in raw):
                    parser()  # complain of what is not installed here, not in a worker
                datasets.enable_progress_bars()
                processes = min(len(os.sched_getaffinity(0)), len(raw) // 1000)
                made = raw.map(split_captions, batched=True, remove_columns=["caption"], fn_kwargs={"with_phrases": with_phrases},
                               features=datasets.Features(image=text, sentences=[text], phrases=[[[text]]]),
                               num_proc=processes if processes > 1 else None, desc="captions to queries")
                if not len(made):
                    fail(f"{path}: every caption in it is empty")
                made.save_to_disk(f"{folder}.tmp")
                os.rename(f"{folder}.tmp", folder)
    except (OSError, datasets.exceptions.DatasetGenerationError) as error:
        fail(f"the cache of captions, {cache} (set by HF_DATASETS_CACHE), cannot be written: {error.__cause__ or error}")
    return datasets.load_from_disk(folder)


class Captions:
    """Images and captions on disk: (epoch, index) -> pixels [3, size, size], queries as of `queries`, and what was unreadable.

    An unreadable image is replaced by another sample; its name, and why, is in the list of what was unreadable.
    """

    def __init__(self, path, root, size, sentences, phrases, seed=0, captions_only=False):
        self.rows, self.root, self.size = prepare(path, phrases > 0 and not captions_only), Path(root), size
        self.sentences, self.phrases, self.seed, self.captions_only = sentences, phrases, seed, captions_only

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, at):
        rng, index, unreadable = random.Random(f"{self.seed} {at}"), at[1], []
        while True:
            row = self.rows[index]
            try:
                with Image.open(self.root / row["image"]) as image:
                    pixels = random_crop(image, self.size, rng)
                break
            except UNREADABLE as error:
                unreadable.append(f"{self.root / row['image']}: {error}")
            if len(unreadable) == 20:  # if this goes on, the count of them ends the run
                pixels = torch.zeros(3, self.size, self.size)
                break
            index = rng.randrange(len(self))
        drawn = draw_sentences(len(row["sentences"]), self.sentences, rng)
        phrases = order_phrases([row["phrases"][i] for i in drawn])
        return pixels, *queries([row["sentences"][i] for i in drawn], phrases, self), unreadable


# --------------------------------------------------------------------------------- samples to batches

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)  # CLIP's
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


UNREADABLE = (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError)  # what PIL raises of a broken image


def rgb(image):
    """Any PIL image -> RGB. PIL clips 16 bits to white, they are scaled here; of an animation the first frame is taken."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) / 256).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def to_pixels(image, size, whole=False):
    """A PIL image -> normalised pixels [3, size, size]: shorter side to `size`, bicubic, then the centre (SPEC §6).

    `whole`: the whole image to size x size, ignoring its aspect (FG-OVD's protocol).
    """
    image = rgb(image)
    image = image.resize((size, size)) if whole else center_crop(resize(image, size, InterpolationMode.BICUBIC), size)
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - MEAN) / STD


def random_crop(image, size, rng):
    """A PIL image, best not decoded yet -> pixels [3, size, size] of RandomResizedCrop(size, scale (0.5, 1)), bilinear (SPEC §4)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.getrandbits(63))
        top, left, height, width = RandomResizedCrop.get_params(image, (0.5, 1), (3 / 4, 4 / 3))
    full = image.size
    # a JPEG is decoded at the smallest scale (1, 1/2, 1/4, 1/8) that still has `size` pixels across the crop
    image.draft("RGB", (math.ceil(full[0] * size / width), math.ceil(full[1] * size / height)))
    x, y = image.size[0] / full[0], image.size[1] / full[1]
    box = (left * x, top * y, (left + width) * x, (top + height) * y)
    return to_pixels(rgb(image).resize((size, size), Image.Resampling.BILINEAR, box), size)


def draw_sentences(count, wanted, rng):
    """Positions of the sentences of one draw, `wanted` of `count` in random order; all, in order, where there are no more.

    With `wanted` = 0 no sentence is a query, and the caption is made of DRAWN.
    """
    wanted = wanted or DRAWN
    return rng.sample(range(count), wanted) if count > wanted else range(count)


def queries(sentences, phrases, want):
    """Drawn sentences and their phrases -> texts (the caption, then its sentences) and phrases (SPEC §5.4, §5.5).

    `want` is the data set: it has the numbers of `sentences` and `phrases`, and `captions_only`.
    """
    caption = [". ".join(sentences)]
    if want.captions_only:
        return caption, []
    return caption + (sentences if want.sentences else []), phrases[:want.phrases]


def token_ids(tokenizer, texts, limits=itertools.repeat(CONTEXT)):
    """Texts -> lists of token ids, BOS … EOS. One longer than its limit is cut so that EOS stays its last token."""
    texts = [text.translate(QUOTES) for text in texts]
    unique = list(dict.fromkeys(texts))
    ids = dict(zip(unique, (one.ids for one in tokenizer.backend_tokenizer.encode_batch_fast(unique))))
    return [ids[text] if len(ids[text]) <= limit else ids[text][: limit - 1] + ids[text][-1:] for text, limit in zip(texts, limits)]


def tokenize(tokenizer, texts, limits=itertools.repeat(CONTEXT)):
    """Texts -> list of 1-D LongTensors, as of `token_ids`."""
    return [torch.tensor(ids) for ids in token_ids(tokenizer, texts, limits)]


def collate(samples, tokenizer):
    """[(pixels, texts, phrases, unreadable)] -> pixels [B, 3, H, W], the tokens of all queries end to end [T],
    their lengths [N], owner [N], and what was unreadable (list of str).

    One flat tensor crosses from worker to trainer where 2,000 small ones would cost more than the step;
    `tokens.split(lengths.tolist())` is the list of texts again.
    """
    pixels, texts, phrases, unreadable = zip(*samples)
    counts = [(len(t), len(p)) for t, p in zip(texts, phrases)]
    limits = [limit for t, p in counts for limit in [CONTEXT] * t + [PHRASE_TOKENS] * p]
    ids = token_ids(tokenizer, [text for both in zip(texts, phrases) for part in both for text in part], limits)
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor([t + p for t, p in counts]))
    tokens = torch.tensor(list(itertools.chain.from_iterable(ids)))
    return torch.stack(pixels), tokens, torch.tensor([len(text) for text in ids]), owner, sum(unreadable, [])


class Batches:
    """The batches of one rank, for a DataLoader: lists of (epoch, index), of images `start` to `stop` of the stream.

    All ranks walk one endless stream: the data set shuffled once an epoch, epoch after epoch. A micro-step takes
    the next `world` x `batch` of it, so each sample is drawn exactly once an epoch (SPEC §10.3), no tail is
    dropped, and a step's samples follow from the images seen before it alone.
    """

    def __init__(self, size, batch, start, stop, rank=0, world=1, seed=0):
        self.size, self.batch, self.start, self.stop, self.rank, self.world, self.seed = size, batch, start, stop, rank, world, seed

    def __iter__(self):
        epoch = None
        for first in range(self.start + self.rank * self.batch, self.stop, self.world * self.batch):
            samples = []
            for at in range(first, first + self.batch):
                if at // self.size != epoch:
                    epoch = at // self.size
                    order = np.random.default_rng([self.seed, epoch]).permutation(self.size)
                samples.append((epoch, int(order[at % self.size])))
            yield samples
