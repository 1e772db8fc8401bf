"""Measure speed against simple baselines, which are in this file. Run by hand.

    python tests/benchmark.py                               # all parts for a CPU
    python tests/benchmark.py --only text --repeats 3
    python tests/benchmark.py --device cuda                 # also steps of ViT-B/16 and ViT-L/14

Both sides of a line are timed alternately (A B A B …), and medians are printed. Weights and tokens
are random; texts are as long as real ones, but for the longest phrases.
"""

import argparse
import itertools
import random
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the scripts are not a package
import torch
from test_loss import dense_beta_cal
from torch.utils.checkpoint import checkpoint
from transformers import CLIPConfig, CLIPModel

import data
import loss
import model as models
import train

SIZES = {  # patch size, D, width and layers of the image encoder and of the text encoder
    "ViT-B/16": (16, 512, (768, 12), (512, 12)),
    "ViT-L/14": (14, 768, (1024, 24), (768, 12)),
    "small": (16, 256, (256, 4), (256, 4)),
}
recompute = partial(checkpoint, use_reentrant=False)


def build(name, device="cpu"):
    """A BetaCLIP of a size of SIZES, with random weights and the pooler in use."""
    patch_size, dim, *encoders = SIZES[name]
    vision, text = (
        {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
         "num_attention_heads": width // 64} for width, layers in encoders)
    vision["patch_size"] = patch_size
    config = CLIPConfig(projection_dim=dim, vision_config=vision, text_config=text)
    model = models.BetaCLIP(CLIPModel(config)).to(device)
    model.use_pooler = True
    return model


def batch(images=64, phrases=30, seed=0):
    """A batch of random images, each with a caption, five sentences, and phrases."""
    rng = random.Random(seed)
    lengths_of_image = [(60, 130, 222), *5 * [(8, 25, 60)], *phrases * [(3, 4.3, 9)]]
    texts = []
    for shortest, mean, longest in images * lengths_of_image:
        length = round(min(longest, max(shortest, rng.gauss(mean, mean / 4))))
        texts.append([49406, *rng.choices(range(49406), k=length - 2), 49407])
    level = torch.tensor([0] + 5 * [1] + phrases * [2])
    pixels = torch.randint(256, (images, 3, 224, 224), dtype=torch.uint8,
                           pin_memory=torch.cuda.is_available())
    return data.Batch(pixels, models.pack(texts), read_errors=[], level=level.repeat(images),
                      image_of_query=torch.arange(images).repeat_interleave(len(level)),
                      caption_index=torch.arange(images) * len(level))


def time_alternately(repeats, *functions):
    """The median time of each function, in seconds, called alternately after a warm-up."""
    times = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, its_times in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            its_times.append(time.perf_counter() - start)
    return [sorted(its_times[1:])[repeats // 2] for its_times in times]


def print_row(what, ours, baseline):
    """Print a line of the table: two numbers, and how many times ours is less."""
    print(f"{what:<66}{ours:>10.3g}{baseline:>10.3g}{baseline / ours:>8.2f} x", flush=True)


# ---- text encoder --------------------------------------------------------------------------------
def encode_padded(model, one_batch):
    """Encode the texts as the authors do: captions and sentences padded to the longest caption, and
    phrases to the longest phrase. Yields the embeddings of each level."""
    texts = one_batch.texts
    starts = texts.offsets[:-1][texts.inverse]
    lengths = texts.offsets.diff()[texts.inverse]
    text_model = model.clip.text_model
    for level, name in enumerate(data.LEVELS):
        chosen = one_batch.level == level
        longest = lengths[chosen].max() if name == "phrase" else lengths.max()
        positions = torch.arange(longest, device=lengths.device)
        index = (starts[chosen, None] + positions).clamp(max=len(texts.tokens) - 1)
        x = text_model.embeddings.token_embedding(texts.tokens[index])  # [n, L, C], any after EOS
        x = x + text_model.embeddings.position_embedding(positions)
        for layer in text_model.encoder.layers:
            x = layer(x, attention_mask=None, is_causal=True)
        eos = x[torch.arange(len(x), device=x.device), lengths[chosen] - 1]             # [n, C]
        yield model.clip.text_projection(text_model.final_layer_norm(eos))


def measure_text(device, repeats):
    """Both passes of the text encoder, for packed and for padded texts."""
    one_batch = batch().to(device)
    model = build("ViT-B/16" if device == "cuda" else "small", device)

    def run_packed():
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            model.encode_text(one_batch.texts).float().sum().backward()

    def run_padded():
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            for embeddings in encode_padded(model, one_batch):  # in turn, for less memory
                embeddings.float().sum().backward()

    ours, baseline = time_alternately(repeats, run_packed, run_padded)
    print_row("encode_text, both passes, against padded levels: s", ours, baseline)


# ---- losses --------------------------------------------------------------------------------------
def make_cal(device, form, function):
    """A function that computes β-CAL and its gradients, for 256 images, K = 36 and D = 512."""
    visual, text = torch.randn(2, 256 * 36, 512, device=device).requires_grad_()
    scale = torch.tensor(14.3, device=device)
    image_of_query = torch.arange(256).repeat_interleave(36)

    def run():
        value = function(visual, text, image_of_query, scale, 0.5, form)
        return torch.autograd.grad(value, (visual, text))
    return run


def measure_losses(device, repeats):
    """beta_cal against its definition."""
    functions = (loss.beta_cal, dense_beta_cal)
    for form in ("ce", "bce"):
        name = f"β-CAL {form.upper()}, N = 9,216, D = 512, against dense"
        runs = [make_cal(device, form, function) for function in functions]
        print_row(f"{name}: s", *time_alternately(repeats, *runs))


# ---- training steps ------------------------------------------------------------------------------
def make_trainer(device, name, batches, *options):
    """A model, its optimiser, and a function that takes a training step on the next batch."""
    precision = "bf16" if device == "cuda" else "off"
    args = train.parse_args(["--data", "sharegpt4v", "--accum", "1", "--amp", precision, *options])
    model = build(name, device).train()
    if args.grad_checkpointing:
        model.run_layer = recompute
    optimizer = torch.optim.AdamW(train.parameter_groups(model, args.wd), lr=1e-5, fused=True)
    scaler = torch.amp.GradScaler(device, enabled=False)
    return model, optimizer, partial(train.train_step, model, batches, optimizer, scaler, args)


def plain_step(model, one_batch, optimizer):
    """A step in the authors' way: padded levels, usual layers, recomputed, and dense losses."""
    vision = model.clip.vision_model
    x = vision.pre_layrnorm(vision.embeddings(one_batch.pixels / 255))
    for layer in vision.encoder.layers:
        x = recompute(layer, x, None)
    x = model.clip.visual_projection(vision.post_layernorm(x))                      # [B, 1 + P, D]
    by_level = torch.cat(list(encode_padded(model, one_batch)))
    text = by_level[one_batch.level.argsort(stable=True).argsort()]                 # [N, D]
    pooled = model.pooler(text, one_batch.image_of_query, x[:, 1:])                 # [N, D]
    l_clip = dense_beta_cal(x[:, 0], text[one_batch.caption_index], torch.arange(len(x)),
                            model.clip.logit_scale.exp(), 0)
    l_cal = dense_beta_cal(pooled, text, one_batch.image_of_query, model.pooler.logit_scale.exp(),
                           0.5)
    (l_clip + l_cal).backward()
    optimizer.step()
    optimizer.zero_grad()


def time_training(name, images, phrases, *options):
    """Print images/s and the peak memory of training steps on a GPU, each with a new batch."""
    torch.cuda.reset_peak_memory_stats()
    batches = [batch(images, phrases, seed) for seed in range(11)]  # one is to warm up
    moved = train.device_batches(batches, loss.join_processes())
    _, _, step = make_trainer("cuda", name, moved, *options)
    [seconds] = time_alternately(10, step)
    gib = torch.cuda.max_memory_allocated() / 2**30
    what = " ".join([f"{name}, {images} images, {phrases} phrases", *options])
    print(f"{what:<66}{images / seconds:>10.1f}{gib:>10.1f}", flush=True)


def measure_steps(device, repeats):
    """Training steps: on a CPU, against the plain step; on a GPU, for models, batches, options."""
    one_batch = batch(16)
    model, optimizer, step = make_trainer("cpu", "small", itertools.repeat(one_batch))
    run_plain = partial(plain_step, model, one_batch, optimizer)
    ours, baseline = time_alternately(repeats, step, run_plain)
    print_row("training step, 4 + 4 layers, 16 images, against plain: s", ours, baseline)
    if device == "cuda":
        print(f"{'training on this GPU':<66}{'images/s':>10}{'GiB':>10}")
        for name, images in (("ViT-B/16", 64), ("ViT-B/16", 256), ("ViT-L/14", 64)):
            for options in ((30,), (0,), (30, "--grad-checkpointing")):
                time_training(name, images, *options)


PARTS = {"text": measure_text, "losses": measure_losses, "steps": measure_steps}

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    loss.join_processes()
    is_gpu = args.device == "cuda"
    machine = torch.cuda.get_device_name() if is_gpu else f"{torch.get_num_threads()} threads"
    print(f"{f'{machine}, torch {torch.__version__}':<66}{'ours':>10}{'baseline':>10}{'ratio':>10}")
    for part in args.only:
        PARTS[part](args.device, args.repeats)
