"""What is fast here, as ratios against plain baselines that stand in this file. Run by hand; pytest does not collect it.

    python tests/benchmark.py                        # CPU: texts, β-CAL, loader, evaluation, steps of a small model
    python tests/benchmark.py --device cuda          # the same on a GPU, with training steps of ViT-B/16 and ViT-L/14
    python tests/benchmark.py --only text loss       # some parts alone

Both sides of a line are measured in turn (A B A B …) in one run, the median of several is shown. Texts are random tokens
of the lengths of SPEC §5, weights are random: neither changes how long anything takes.
"""

import argparse
import io
import multiprocessing
import os
import random
import re
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))                     # the scripts are no package
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}  # a loader's process has one core; no download
os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # a fresh process gives back what it frees: its peak is what is in use
import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import Image
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel

import data
import eval as evaluation
import loss
import model as models
import train

IMAGES, SENTENCES, PHRASES, DIM = 64, 5, 30, 512
THREADS = torch.get_num_threads()
WORDS = [*data.COLOURS, *data.SHAPES, *data.BACKGROUNDS, "a", "the", "of", "on", "large", "small", "card", "left", "above"]


def build(name, device):
    """A CLIP with random weights, by (patch, vision width and layers, text width and layers, D)."""
    patch, *towers, dim = {"ViT-B/16": (16, (768, 12), (512, 12), 512), "ViT-L/14": (14, (1024, 24), (768, 12), 768),
                           "small": (16, (256, 2), (256, 2), 256)}[name]
    vision, text = (dict(hidden_size=w, intermediate_size=4 * w, num_hidden_layers=n, num_attention_heads=w // 64) for w, n in towers)
    return models.BetaCLIP(CLIPModel(CLIPConfig(projection_dim=dim, vision_config=vision | {"patch_size": patch}, text_config=text))).to(device)


# ---------------------------------------------------------------------------------- measuring

def in_turn(device, repeats, *functions):
    """Median seconds of each function, called in turn, `repeats` times after a warm-up."""
    wait, seconds = torch.cuda.synchronize if device == "cuda" else lambda: None, [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, mine in zip(functions, seconds):
            wait()
            start = time.perf_counter()
            function()
            wait()
            mine.append(time.perf_counter() - start)
    return [statistics.median(mine[1:]) for mine in seconds]


def resident(kind):
    """GiB of this process's memory, VmRSS now or VmHWM at its peak (Linux)."""
    return int(re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20


def peak(device, function):
    """GiB that `function` needs above what was in use before it. On a CPU (Linux) only right in a fresh process."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def line(what, ours="", plain="", ratio=None, goal=None, at_most=False):
    """Print a line of the table; `goal` is the least ratio that is wanted, or the most."""
    met = "" if goal is None else "met" if ratio == goal or (ratio < goal) == at_most else "MISSED"
    wanted = "" if goal is None else f"{'<=' if at_most else '>='} {goal:g}"
    print(f"{what:<66}{ours:>13}{plain:>15}{'' if ratio is None else f'{ratio:.2f}':>9}  {wanted:<8}{met}".rstrip(), flush=True)


# -------------------------------------------------------------------------------------- texts

def queries(rng, images, phrases=PHRASES):
    """Random tokens of SPEC §5's lengths -> for each image its levels: [caption], sentences, phrases."""
    def text(length):
        return torch.tensor([49406, *(rng.randrange(49406) for _ in range(length - 2)), 49407])

    def about(mean, spread, low, high):
        return text(min(high, max(low, round(rng.gauss(mean, spread)))))

    return [[[about(130, 30, 60, 222)], [about(25, 7, 8, 60) for _ in range(SENTENCES)],
             [text(*rng.choices(range(3, 9), (25, 38, 22, 9, 4, 2))) for _ in range(max(0, phrases - rng.randrange(7)))]] for _ in range(images)]


def padded(model, texts, length):
    """Texts of one level, all padded to one length -> [n, D]."""
    ids = torch.stack([F.pad(text, (0, length - len(text))) for text in texts]).to(model.device)           # [n, L]
    hidden = model.clip.text_model(input_ids=ids).last_hidden_state                                        # [n, L, W]
    return model.clip.text_projection(hidden[torch.arange(len(ids)), torch.tensor([len(text) - 1 for text in texts])])


def text(device, repeats):
    """encode_text against level by level: sentences padded to the longest caption, phrases to 30 (SPEC §10.4)."""
    model = build("ViT-B/16" if device == "cuda" else "small", device)
    batches = [queries(random.Random(seed), IMAGES) for seed in range(5)]
    flat = [[text for image in batch for level in image for text in level] for batch in batches]
    seen = []
    hook = model.clip.text_model.embeddings.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"].numel()), with_kwargs=True)
    with torch.inference_mode():
        for texts in flat:
            model.encode_text(texts)
    hook.remove()
    real = sum(len(text) for texts in flat for text in texts)
    line(f"tokens of {IMAGES} images, in {len(seen) / len(flat):.0f} chunks: processed, real", f"{sum(seen) // len(flat):,}", f"{real // len(flat):,}",
         sum(seen) / real, 1.15, at_most=True)

    def run(encode):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            embeddings = encode()
        embeddings.float().sum().backward()

    def plain():
        captions, sentences, phrases = ([text for image in batches[0] for text in image[level]] for level in range(3))
        longest = max(map(len, captions))
        for texts, length in ((captions, longest), (sentences, longest), (phrases, data.PHRASE_TOKENS)):
            run(lambda: padded(model, texts, length))  # each level by itself: the same work in less memory

    fast, slow = in_turn(device, repeats, lambda: run(lambda: model.encode_text(flat[0])), plain)
    line("encode_text, forward and backward: seconds", f"{fast:.3f}", f"{slow:.3f}", slow / fast, 2.5)


# -------------------------------------------------------------------------------------- β-CAL

def dense(visual, text, owner, scale, beta, kind):
    """β-CAL with its targets written out."""
    owner = owner.to(visual.device)
    same = owner[:, None] == owner                                                                         # [N, N]
    weight = torch.where(same, beta, 0.0).fill_diagonal_(1)
    logits = scale * loss.unit(visual) @ loss.unit(text).T
    if kind == "ce":
        target = weight / weight.sum(1, keepdim=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    weight = torch.where(same, weight, 1.0)
    return F.binary_cross_entropy_with_logits(logits, same.float(), weight, reduction="sum") / logits.numel()


def cal(device, kind, function, images=256, k=36):
    """A forward and backward pass of β-CAL, ready to be called."""
    torch.manual_seed(0)
    visual, text = torch.randn(2, images * k, DIM, device=device).unbind()
    scale, owner = torch.tensor(14.3, device=device), torch.arange(images).repeat_interleave(k)
    leaves = [x.requires_grad_() for x in (visual, text, scale)]
    return lambda: torch.autograd.grad(function(*leaves[:2], owner, scale, 0.5, kind), leaves)


def cal_peak(device, kind, function):
    cal(device, kind, function, images=2)()  # what a first call allocates for good is no one's extra
    return peak(device, cal(device, kind, function))


def losses(device, repeats):
    """beta_cal against `dense`, and at a size where `dense` would need terabytes."""
    sides = loss.beta_cal, dense
    for kind, name in (("ce", "soft"), ("bce", "hard")):
        fast, slow = in_turn(device, repeats, *(cal(device, kind, side) for side in sides))
        line(f"β-CAL, {name}, N = 9,216, D = {DIM}: seconds", f"{fast:.3f}", f"{slow:.3f}", slow / fast, 1)
        if device == "cuda":
            low, high = map(partial(cal_peak, device, kind), sides)
        else:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as fresh:
                low, high = fresh.map(partial(cal_peak, device, kind), sides)
        line(f"β-CAL, {name}, N = 9,216, D = {DIM}: extra peak memory, GiB", f"{low:.3f}", f"{high:.3f}", high / low, 8)
        if device == "cuda":
            large = cal(device, kind, loss.beta_cal, images=4096)
            line(f"β-CAL, {name}, N = 147,456, D = {DIM}: seconds, GiB", f"{in_turn(device, 1, large)[0]:.2f}", f"{peak(device, large):.1f} GiB")


# ------------------------------------------------------------------------------------- loader

def noise(rng, width, height):
    """A picture of noise at all scales, about as compressible as a photograph."""
    picture = Image.new("RGB", (width, height))
    for cells in (4, 16, 64, 256, width // 2):
        grain = Image.frombytes("RGB", (cells, cells), rng.randbytes(3 * cells**2))
        picture = Image.blend(picture, grain.resize((width, height), Image.Resampling.BICUBIC), 0.25)
    return picture


def spacy_pipeline():
    """en_core_web_sm, or where it is absent an untrained pipeline of its layers and widths -> what it is, the pipeline."""
    import spacy
    from spacy.training import Example
    try:
        return "en_core_web_sm", spacy.load("en_core_web_sm", exclude=["ner", "lemmatizer"])
    except OSError:
        nlp = spacy.blank("en")
        nlp.add_pipe("tok2vec")
        for part in ("morphologizer", "parser"):  # both read the one tok2vec
            nlp.add_pipe(part, config={"model": {"tok2vec": {"@architectures": "spacy.Tok2VecListener.v1", "width": 96}}})
        labels = dict(pos=["NOUN", "VERB", "ADJ", "ADP", "DET"], morphs=[""] * 5, heads=[0, 0, 1, 2, 3], deps=["ROOT", "det", "prep", "pobj", "amod"])
        nlp.initialize(lambda: [Example.from_dict(nlp.make_doc("a b c d e"), labels)])
        return "spaCy model absent: untrained", nlp


def loader(device, repeats, jpegs=6):
    """Texts against spaCy and one tokenizer call a text at each draw; JPEGs of SAM's size with and without `draft`."""
    torch.set_num_threads(1)  # as in a loader's process
    rng, tokenizer, want = random.Random(0), data.scenes_tokenizer(), SimpleNamespace(sentences=SENTENCES, phrases=PHRASES, captions_only=False)
    words = [[rng.choices(WORDS, k=18) for _ in range(6)] for _ in range(IMAGES)]                          # 6 sentences, 108 words
    rows = Dataset.from_dict({"sentences": [list(map(" ".join, caption)) for caption in words], "phrases": [  # 42 phrases
        [[[" ".join(sentence[at:at + rng.randint(1, 4)]) for at in rng.sample(range(15), 7)], [], []] for sentence in caption] for caption in words]})

    def drawn(index):
        row = rows[index]
        chosen = data.draw_sentences(len(row["sentences"]), SENTENCES, rng)
        return [row["sentences"][i] for i in chosen], data.order_phrases([row["phrases"][i] for i in chosen])

    def texts():
        data.collate([(torch.zeros(3, 1, 1), *data.queries(*drawn(index), want), []) for index in range(IMAGES)], tokenizer)

    def texts_plain():
        for index in range(IMAGES):
            sentences, phrases = drawn(index)
            data.extract_phrases(nlp(". ".join(sentences)), matchers)  # the row's are taken: untrained, it finds others
            for text in [". ".join(sentences), *sentences, *phrases[:PHRASES]]:
                torch.tensor(tokenizer(text)["input_ids"])

    try:
        name, nlp = spacy_pipeline()
        matchers = data.phrase_matchers(nlp.vocab)
        fast, slow = in_turn("cpu", repeats, texts, texts_plain)
        line(f"texts of a sample: ms ({name})", f"{1e3 * fast / IMAGES:.2f}", f"{1e3 * slow / IMAGES:.2f}", slow / fast, 10)
    except ImportError:
        fast, = in_turn("cpu", repeats, texts)
        line("texts of a sample: ms (spaCy absent)", f"{1e3 * fast / IMAGES:.2f}")

    files = [io.BytesIO() for _ in range(jpegs)]
    for file in files:
        noise(rng, 2250, 1500).save(file, "JPEG", quality=90)

    def crops(decode_first):
        for file in files:
            with Image.open(file) as image:
                if decode_first:
                    image.load()  # and `draft` comes too late
                data.random_crop(image, 224, rng)

    draft, full = in_turn("cpu", repeats, partial(crops, False), partial(crops, True))
    size = len(files[0].getvalue()) / 1e6
    line(f"JPEG of 2250 x 1500, {size:.1f} MB, to 224 x 224: ms, plain without draft", f"{1e3 * draft / jpegs:.1f}", f"{1e3 * full / jpegs:.1f}", full / draft)
    line("samples/s a core: with images, texts alone", f"{1 / (draft / jpegs + fast / IMAGES):.0f}", f"{IMAGES / fast:.0f}")
    torch.set_num_threads(THREADS)


# --------------------------------------------------------------------------------- evaluation

def boxes(rng, part):
    """That part of FG-OVD's four splits -> images (JPEGs in memory) and splits, with as many boxes an image as there,
    and as many rows an expression."""
    items, splits = [io.BytesIO() for _ in range(int(1707 * part))], {}
    for item in items:
        noise(rng, 640, 480).save(item, "JPEG")
    for name, count in zip(evaluation.LEVELS, (3545, 2968, 1299, 3545)):
        different = [" ".join(rng.choices(WORDS, k=rng.randint(6, 14))) for _ in range(int(20943 / 3545 * count * part))]
        splits[name] = [(number % len(items), [rng.uniform(0, 300), rng.uniform(0, 200), rng.uniform(30, 300), rng.uniform(30, 250)],
                         rng.sample(different, 11)) for number in range(int(count * part))]
    return items, splits


def one_box_at_a_time(model, tokenizer, load, items, splits):
    for at, box, expressions in sum(splits.values(), []):
        image = load(items[at])
        _, patches = model.encode_image(data.to_pixels(image, model.image_size, whole=True)[None].to(model.device))  # [1, P, D]
        region = evaluation.box_embeddings(patches, torch.tensor([box]).to(patches) / torch.tensor(image.size * 2).to(patches),
                                           torch.zeros(1, dtype=torch.long, device=model.device))                    # [1, D]
        texts = F.normalize(model.encode_text(data.tokenize(tokenizer, expressions)), dim=-1)                        # [11, D]
        evaluation.hits(region @ texts.T).item()


def regions(device, repeats):
    """FG-OVD's protocol as eval.py runs it, against one box at a time."""
    model, tokenizer = build("ViT-B/16" if device == "cuda" else "small", device).eval(), data.scenes_tokenizer()
    items, splits = boxes(random.Random(0), 0.2 if device == "cuda" else 0.01)
    with torch.inference_mode():
        fast, slow = in_turn(device, repeats, *(partial(way, model, tokenizer, lambda item: data.rgb(Image.open(item)), items, splits)
                                                for way in (evaluation.fine_grained, one_box_at_a_time)))
    count = sum(map(len, splits.values()))
    line(f"FG-OVD, {count} boxes on {len(items)} images: boxes/s", f"{count / fast:.0f}", f"{count / slow:.0f}", slow / fast, 10 if device == "cuda" else 4)


# ----------------------------------------------------------------------------- training steps

def training(device, name, images, k, option, rate, steps):
    """A line for train.py's step: images/s; TFLOP/s of what the plain step needs, also as a share of the matmul rate;
    memory at its peak (on a CPU the whole process's)."""
    torch.set_float32_matmul_precision("high")
    cuda, model = device == "cuda", build(name, device).train()
    optimizer = torch.optim.AdamW(train.parameter_groups(model, 0.01), lr=1e-5, betas=(0.9, 0.98), fused=True)

    def batch(seed, images):
        texts = [sum(levels, []) for levels in queries(random.Random(seed), images, k - 1 - SENTENCES)]
        pixels = torch.randn(images, 3, model.image_size, model.image_size)
        return pixels.pin_memory() if cuda else pixels, sum(texts, []), torch.arange(images).repeat_interleave(torch.tensor(list(map(len, texts))))

    def step(pixels, texts, owner):
        with torch.autocast(device, torch.bfloat16, enabled=cuda):
            cls, text, pooled = model(pixels.to(device, non_blocking=True), texts, owner)
        captions = text[torch.searchsorted(owner, torch.arange(len(pixels))).to(device, non_blocking=True)]
        l_clip = loss.clip_loss(cls, captions, model.clip.logit_scale.exp())
        (l_clip + loss.beta_cal(pooled, text, owner, model.pooler.logit_scale.exp(), 0.5)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with FlopCounterMode(display=False) as counter:  # β-CAL's part, which grows with the square, is small
        step(*batch(0, 8))
    for layer in model.layers:  # as train.py does it
        if option == "--grad-checkpointing":
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        if option == "--compile":
            layer.compile()
    batches, what = [batch(seed, images) for seed in range(3)], f"{name}, {images} images, K = {k} {option}"
    try:
        seconds = in_turn(device, 3, lambda: [step(*batches[number % 3]) for number in range(steps)])[0] / steps
    except torch.OutOfMemoryError:
        return print(f"{what:<52} out of memory", flush=True)
    done = counter.get_total_flops() / 8 * images / seconds
    memory = torch.cuda.max_memory_allocated() / 2**30 if cuda else resident("VmHWM")
    print(f"{what:<52}{images / seconds:>10.1f}{done / 1e12:>11.2f}{done / rate:>10.0%}{memory:>9.2f}", flush=True)


def trainings(device, repeats):
    """How training grows with the images of a batch, with K, and with train.py's options. The goal: 35 % at B/16, 64, 36."""
    cuda = device == "cuda"
    matrix, kind = (8192, torch.bfloat16) if cuda else (2048, torch.float32)
    a, b = torch.randn(2, matrix, matrix, device=device, dtype=kind)
    rate = 20 * matrix**3 / in_turn(device, repeats, lambda: [a @ b for _ in range(10)])[0]
    print(f"\n{kind} matmul of {matrix}: {rate / 1e12:.2f} TFLOP/s\n{'training step':<52}{'images/s':>10}{'TFLOP/s':>11}{'of matmul':>10}{'GiB':>9}")
    for name, sizes in {"ViT-B/16": (64, 256, 512), "ViT-L/14": (64, 256, 512)}.items() if cuda else {"small": (16,)}.items():
        for k, option in ((36, ""), (6, ""), (36, "--grad-checkpointing"), (36, "--compile")):
            for images in sizes:  # in a process of its own: what one leaves behind is not the next one's
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                    fresh.submit(training, device, name, images, k, option, rate, steps=10 if cuda else 2).result()


PARTS = {"text": text, "loss": losses, "loader": loader, "eval": regions, "train": trainings}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="some parts alone")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=THREADS, help="1 where other jobs run: threads that wait for each other distort")
    args = parser.parse_args()
    torch.set_num_threads(THREADS := args.threads)
    print(f"{torch.cuda.get_device_name() if args.device == 'cuda' else f'CPU, {THREADS} threads'}, torch {torch.__version__}")
    print(f"{'':<66}{'ours':>13}{'plain':>15}{'ratio':>9}  goal")
    for name in args.only:
        PARTS[name](args.device, args.repeats)
