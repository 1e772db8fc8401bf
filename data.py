"""Images, queries and tokens: what a step of training eats (SPEC §5).

A sample is an image and its queries, in the order caption, sentences, phrases. `scenes` draws its own: four
objects, each of a size and a colour on a card of a texture and another colour, with a long caption, its
sentences, its phrases and a box per object. Everything follows from (split, index); no file is on disk.
"""

import itertools
import math
import random
import re
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import pre_tokenizers
from torchvision.transforms.functional import InterpolationMode, center_crop, resize
from transformers import CLIPTokenizer

CONTEXT = 248  # tokens of a text, at most
QUOTES = str.maketrans("’‘“”", "''\"\"")  # OpenAI's tokenizer straightens them, Hugging Face's does not (SPEC §5)
DRAWN = 5      # sentences that make a caption where no sentence is a query


def fail(message):
    """End the program with one line on stderr and exit code 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


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


def scene_boxes(count=SPLITS["test"] // SIBLINGS):
    """FG-OVD's protocol on the objects of the first `count` original test scenes.

    Returns a list of dicts: `image` (index into the test split), `box` (x, y, w, h) in pixels, and, for each of
    hard, medium, easy and trivial, 11 expressions, the positive first.
    """
    rows = []
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
    """The training scenes: (epoch, index) -> an image's pixels [3, size, size] and its queries (list of str)."""

    def __init__(self, size, sentences, phrases, seed=0, captions_only=False):
        self.size, self.sentences, self.phrases, self.seed, self.captions_only = size, sentences, phrases, seed, captions_only

    def __len__(self):
        return SPLITS["train"]

    def __getitem__(self, at):
        one = scene("train", at[1])
        queries = sample_queries(*describe(one), self.sentences, self.phrases, random.Random(f"{self.seed} {at}"))
        return to_pixels(draw(one), self.size), queries[:1] if self.captions_only else queries


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


# --------------------------------------------------------------------------------- samples to batches

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)  # CLIP's
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def to_pixels(image, size):
    """A PIL image -> normalised pixels [3, size, size]: shorter side to `size`, bicubic, then the centre (SPEC §6)."""
    image = center_crop(resize(image.convert("RGB"), size, InterpolationMode.BICUBIC), size)
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - MEAN) / STD


def sample_queries(sentences, phrases, n_sentences, n_phrases, rng):
    """The queries of one draw: the caption, then its sentences, then its phrases (SPEC §5.4, §5.5).

    `n_sentences` are sampled in random order (all, in order, where there are no more) and make the caption;
    with `n_sentences` = 0 the caption is made of DRAWN, and no sentence is a query.
    """
    wanted = n_sentences or DRAWN
    drawn = rng.sample(sentences, wanted) if len(sentences) > wanted else sentences
    return [". ".join(drawn), *(drawn if n_sentences else []), *phrases[:n_phrases]]


def tokenize(tokenizer, texts, limit=CONTEXT):
    """Texts -> list of 1-D LongTensors, BOS … EOS. One longer than `limit` is cut so that EOS stays its last token."""
    ids = tokenizer([text.translate(QUOTES) for text in texts])["input_ids"]
    return [torch.tensor(x if len(x) <= limit else x[: limit - 1] + x[-1:]) for x in ids]


def collate(samples, tokenizer):
    """[(pixels, queries)] -> pixels [B, 3, H, W], the tokens of all queries end to end [T], their lengths [N], owner [N].

    One flat tensor crosses from worker to trainer where 2,000 small ones would cost more than the step;
    `tokens.split(lengths.tolist())` is the list of texts again.
    """
    pixels, queries = zip(*samples)
    texts = tokenize(tokenizer, [text for image in queries for text in image])
    owner = torch.arange(len(queries)).repeat_interleave(torch.tensor([len(image) for image in queries]))
    return torch.stack(pixels), torch.cat(texts), torch.tensor([len(text) for text in texts]), owner


class Batches:
    """The batches of one rank, for a DataLoader: lists of (epoch, index), from micro-step `start` to `stop`.

    All ranks walk one endless stream: the data set shuffled once an epoch, epoch after epoch. A micro-step takes
    the next `world` x `batch` of it, so each sample is drawn exactly once an epoch (SPEC §10.3), no tail is
    dropped, and a step's samples follow from its number alone.
    """

    def __init__(self, size, batch, start, stop, rank=0, world=1, seed=0):
        self.size, self.batch, self.start, self.stop, self.rank, self.world, self.seed = size, batch, start, stop, rank, world, seed

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        epoch = None
        for step in range(self.start, self.stop):
            samples = []
            for at in range((step * self.world + self.rank) * self.batch, (step * self.world + self.rank + 1) * self.batch):
                if at // self.size != epoch:
                    epoch = at // self.size
                    order = np.random.default_rng([self.seed, epoch]).permutation(self.size)
                samples.append((epoch, int(order[at % self.size])))
            yield samples
