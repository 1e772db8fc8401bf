"""The model of β-CLIP (paper, section 3.2): a Hugging Face CLIP with 248 text positions, and a
text-conditioned patch pooler.

At test time it is an ordinary CLIP that compares `cls` with `text`. The patch embeddings are used
for fine-grained tasks; the pooler only serves training.

Shapes. B images of P patches; N texts, the n distinct ones with T tokens in all; embeddings are D
wide, the layers of an encoder C wide, with H heads.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import pickle
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import normalizers
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.activations import ACT2FN
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import logging

from loss import grid_index

CONTEXT = 248  # text positions
FROZEN_POSITIONS = 20  # the first text positions keep CLIP's values (as in Long-CLIP)
OPENAI_B16 = "openai/clip-vit-base-patch16"  # its tokenizer is that of all of OpenAI's CLIPs
QUOTES = {"’": "'", "‘": "'", "“": '"', "”": '"'}  # OpenAI's own tokenizer straightens them
POOLER_FILE = "pooler.safetensors"
NEW_PREFIX = "model."  # of new parameters in POOLER_FILE; those of the pooler have no prefix
POSITION_PREFIX = "clip.text_model.embeddings.position_embedding."
LIBRARY_ERRORS = (OSError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError,
                  RuntimeError, ImportError, EOFError, pickle.UnpicklingError, SafetensorError,
                  StrictDataclassError)  # what libraries raise for bad files
# bf16 and varlen_attn need (8, 0), Ampere; a test may set another value
GPU_CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)


class BetaCLIP(nn.Module):
    """A CLIP, changed in place, with a patch pooler. Images, scaled to 0 … 1, are normalised by a
    mean and std per channel. A parameter that you add is trained and saved like the pooler's."""

    def __init__(self, clip: CLIPModel, mean: list[float] = OPENAI_CLIP_MEAN,
                 std: list[float] = OPENAI_CLIP_STD) -> None:
        super().__init__()
        embeddings = clip.text_model.embeddings
        positions = embeddings.position_embedding.weight.data
        if len(positions) != CONTEXT:
            positions = stretch_positions(positions)
        embeddings.position_embedding = TextPositions(positions)
        clip.config.text_config.max_position_embeddings = CONTEXT
        self.stock_names = set(clip.state_dict(prefix="clip."))  # what is added below is new

        self.clip = clip
        self.pooler = PatchPooler(clip.config.projection_dim)
        self.use_pooler = False  # whether the pooler is trained, saved and evaluated
        self.missing_names: list[str] = []  # those that the loaded checkpoint did not have
        self.image_size = clip.config.vision_config.image_size
        self.register_buffer("mean_and_std", torch.tensor([mean, std]), persistent=False)

    def forward(self, pixels: Tensor, texts: PackedTexts,
                image_of_query: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Encode B images and their N queries, and pool each image by its queries. Returns cls
        [B, D], text [N, D] and pooled [N, D] (None if the pooler is not in use), not normalised."""
        cls, patches = self.encode_image(pixels)
        text = self.encode_text(texts)
        pooled = self.pooler(text, image_of_query, patches) if self.use_pooler else None
        return cls, text, pooled

    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images [B, 3, height, width], uint8, or float and normalised already. Returns cls
        [B, D], CLIP's image embedding, and patches [B, P, D], row by row, not normalised."""
        if pixels.dtype == torch.uint8:
            mean, std = self.mean_and_std[:, :, None, None]                         # [3, 1, 1] each
            pixels = (pixels.float() / 255 - mean) / std
        vision = self.clip.vision_model
        x = vision.pre_layrnorm(vision.embeddings(pixels))                          # [B, 1 + P, C]
        *layers, last_layer = vision.encoder.layers
        for layer in layers:
            x = self.run_layer(layer, x, None)  # None: no attention mask
        x = local_patch_layer(last_layer, x)
        x = self.clip.visual_projection(vision.post_layernorm(x))                   # [B, 1 + P, D]
        return x[:, 0], x[:, 1:]

    def encode_text(self, texts: PackedTexts) -> Tensor:
        """Encode N texts by the final state of their last token, EOS: [N, D], not normalised."""
        text_model = self.clip.text_model
        embeddings = text_model.embeddings
        x = embeddings.token_embedding(texts.tokens)                                # [T, C]
        x = x + embeddings.position_embedding(texts.positions)
        *layers, last_layer = text_model.encoder.layers
        for layer in layers:
            x = self.run_layer(text_layer, layer, x, texts)
        x = text_layer(last_layer, x, texts, only_eos=True)                         # [n, C]
        x = self.clip.text_projection(text_model.final_layer_norm(x))               # [n, D]
        return x[texts.inverse]                                                     # [N, D]

    def run_layer(self, function: Callable, *args: object) -> Tensor:
        """Call any layer but the last; train.py may wrap this in gradient checkpointing."""
        return function(*args)


def stretch_positions(weight: Tensor) -> Tensor:
    """Interpolate text positions (Long-CLIP): [77, C] -> [248, C]. The first 20 rows stay. Each
    later one becomes four, itself and three steps to the next; the last is extrapolated."""
    rest = weight[FROZEN_POSITIONS:]                                                # [57, C]
    to_next = rest.diff(dim=0)                                                      # [56, C]
    to_next = torch.cat([to_next, to_next[-1:]])                                    # [57, C]
    fraction = weight.new_tensor([0, 1 / 4, 1 / 2, 3 / 4])[:, None]                 # [4, 1]
    between = rest[:, None] + fraction * to_next[:, None]                           # [57, 4, C]
    return torch.cat([weight[:FROZEN_POSITIONS], between.flatten(0, 1)])


class TextPositions(nn.Module):
    """Like an nn.Embedding of text positions, but its first 20 rows are a buffer: not trained."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("frozen", weight[:FROZEN_POSITIONS].clone())
        self.learned = nn.Parameter(weight[FROZEN_POSITIONS:].clone())

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, torch.cat([self.frozen, self.learned]))


class PatchPooler(nn.Module):
    """Cross-attention by which each query pools the patches of its image.

        attended = MultiheadAttention(query = text, key = value = patches), all of unit length
        pooled   = attended + MLP(LayerNorm(attended))

    No residual connection leads from the query to the output: it would leak the text into what is
    to be compared with it.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, num_heads=8, batch_first=True)
        self.ln = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), ACT2FN["quick_gelu"], nn.Linear(4 * dim, dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, text: Tensor, image_of_query: Tensor, patches: Tensor) -> Tensor:
        """Pool the patches [B, P, D] of images by queries, text [N, D]: [N, D]. image_of_query [N]
        is the index of each query's image, sorted; it is on the CPU, to be read without waiting."""
        text = F.normalize(text, dim=-1)
        patches = F.normalize(patches, dim=-1)
        # attention takes the queries of each image from a padded grid: K slots per image
        index, k = grid_index(image_of_query, patches.device)
        grid = text.new_zeros(len(patches), k, text.shape[1])                       # [B, K, D]
        grid = grid.index_put(index, text)
        attended, _ = self.attn(grid, patches, patches, need_weights=False)         # [B, K, D]
        attended = attended[index]                                                  # [N, D]
        return attended + self.mlp(self.ln(attended))


# ---- layers and packed texts ---------------------------------------------------------------------
def local_patch_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """The last layer of the image encoder: [B, 1 + P, C] -> [B, 1 + P, C]. CLS attends to all
    tokens as usual. A patch takes its own value, not a mixture of all, and so stays local."""
    attn = layer.self_attn
    h = layer.layer_norm1(x)
    value = attn.v_proj(h)                                                          # [B, 1 + P, C]
    q, k, v = (y.unflatten(2, (attn.num_heads, -1)).transpose(1, 2)     # [B, H, 1 or 1 + P, C / H]
               for y in (attn.q_proj(h[:, :1]), attn.k_proj(h), value))
    cls = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)        # [B, 1, C]
    x = x + attn.out_proj(torch.cat([cls, value[:, 1:]], dim=1))
    return x + layer.mlp(layer.layer_norm2(x))


class PackedTexts(NamedTuple):
    """N texts without padding: the n distinct ones, sorted by length, one after the other. The
    values on the right are those of pack([[8, 1, 9], [8, 9], [8, 1, 9]])."""

    tokens: Tensor     # [T] token ids                                               8 9 8 1 9
    positions: Tensor  # [T] the position of each token in its text                  0 1 0 1 2
    offsets: Tensor    # [n + 1] int32, where each text begins, and T                0 2 5
    inverse: Tensor    # [N] the index of each text among the distinct ones          1 0 1
    groups: list[tuple[int, int]]  # (length, number of such texts), ascending       (2, 1), (3, 1)

    def to(self, device: torch.device) -> PackedTexts:
        tensors = [tensor.to(device, non_blocking=True) for tensor in self[:-1]]
        return PackedTexts(*tensors, self.groups)


def pack(texts: list[list[int]]) -> PackedTexts:
    """Pack texts, each a list of token ids, BOS … EOS."""
    texts = [tuple(text) for text in texts]
    distinct = sorted(dict.fromkeys(texts), key=len)
    index_of = {text: index for index, text in enumerate(distinct)}
    lengths = torch.tensor([len(text) for text in distinct])                        # [n]
    offsets = F.pad(lengths.cumsum(0), (1, 0))                                      # [n + 1]
    return PackedTexts(
        tokens=torch.tensor([token for text in distinct for token in text]),
        positions=torch.arange(offsets[-1]) - offsets[:-1].repeat_interleave(lengths),
        offsets=offsets.int(),
        inverse=torch.tensor([index_of[text] for text in texts]),
        groups=sorted(Counter(lengths.tolist()).items()),
    )


def text_layer(layer: nn.Module, x: Tensor, texts: PackedTexts, only_eos: bool = False) -> Tensor:
    """Apply a layer of the text encoder to each of the packed texts, [T, C] -> [T, C], as its own
    `forward` does to one text; if only_eos, return just its output for the EOS tokens, [n, C]."""
    attn = layer.self_attn
    h = layer.layer_norm1(x)
    rows = texts.offsets[1:] - 1 if only_eos else slice(None)           # those of EOS, or all
    query = attn.q_proj(h[rows])                                                    # [T or n, C]
    attended = attend(query, attn.k_proj(h), attn.v_proj(h), attn.num_heads, texts, only_eos)
    x = x[rows] + attn.out_proj(attended)
    return x + layer.mlp(layer.layer_norm2(x))


def attend(query: Tensor, key: Tensor, value: Tensor, num_heads: int, texts: PackedTexts,
           only_eos: bool) -> Tensor:
    """Causal attention within each of the packed texts: [T, C]; or, if only_eos, attention from the
    last tokens, the only ones in query: [n, C]."""
    query, key, value = (x.unflatten(1, (num_heads, -1)) for x in (query, key, value))  # [T, H, …]
    if query.is_cuda and query.dtype != torch.float32 and GPU_CAPABILITY >= (8, 0):
        starts = texts.offsets  # FlashAttention takes packed texts as they are
        longest = texts.groups[-1][0]
        if not only_eos:  # any number of tokens to the left, none to the right
            return varlen_attn(query, key, value, starts, starts, longest, longest,
                               window_size=(-1, 0)).flatten(1)
        query_starts = torch.arange(len(starts), device=query.device, dtype=torch.int32)  # one each
        return varlen_attn(query, key, value, query_starts, starts, 1, longest).flatten(1)

    # texts of equal length stand side by side, so that they are a dense batch
    counts = [count for _, count in texts.groups]
    sizes = [length * count for length, count in texts.groups]
    queries = query.split(counts if only_eos else sizes)
    out = []
    for count, q, k, v in zip(counts, queries, key.split(sizes), value.split(sizes), strict=True):
        q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=not only_eos)
        out.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(out).flatten(1)


# ---- loading -------------------------------------------------------------------------------------
class InputError(ValueError):
    """An error in the user's input. It says what is wrong, where, and what to do."""


@contextlib.contextmanager
def input_errors(problem: str, *more_errors: type[Exception]) -> Iterator[None]:
    """Turn the errors of a library that is called on the user's input into InputErrors."""
    try:
        yield
    except (*LIBRARY_ERRORS, *more_errors) as error:
        reason = str(error.__cause__ or error) or type(error).__name__  # `datasets` wraps it
        raise InputError(f"{problem}: {reason}") from error


@contextlib.contextmanager
def command_line() -> Iterator[None]:
    """Run a program: an InputError ends it with one line, and transformers prints only errors."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # some consoles cannot print β
            stream.reconfigure(errors="replace")
    try:
        yield
    except InputError as error:
        message = " ".join(str(error).split())[:600]
        tqdm.write(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
        raise SystemExit(2) from error


def load(source: str | Path) -> tuple[BetaCLIP, CLIPTokenizer]:
    """Load a model, on the CPU and in eval mode, and its tokenizer from a run, a checkpoint file of
    the authors, or a CLIP in a folder or on the hub. Raises InputError."""
    folder = Path(source, "hf") if Path(source, "hf").is_dir() else source
    if Path(source).is_file():
        model = from_authors(read_checkpoint(source, "state_dict")["state_dict"], str(source))
        folder = OPENAI_B16
    else:
        model = from_hugging_face(folder)
    with input_errors(f"{folder}: the tokenizer cannot be loaded"):
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    vocab_size = model.clip.config.text_config.vocab_size
    if not 256 < len(tokenizer) <= vocab_size:  # lacking files, transformers makes a 3-token one
        raise InputError(f"{folder}: a tokenizer of {len(tokenizer)} tokens, not 257–{vocab_size}")
    tokenizer.backend_tokenizer.no_truncation()  # these settings may have been saved with it
    tokenizer.backend_tokenizer.no_padding()
    return model.eval(), straighten_quotes(tokenizer)


def straighten_quotes(tokenizer: CLIPTokenizer) -> CLIPTokenizer:
    """Have a tokenizer read ’ ‘ “ ” as ' and ", as OpenAI's does. Changes and returns it."""
    backend = tokenizer.backend_tokenizer
    if backend.normalizer.normalize_str("’") != "'":
        steps = [normalizers.Replace(curly, straight) for curly, straight in QUOTES.items()]
        backend.normalizer = normalizers.Sequence([*steps, backend.normalizer])
    return tokenizer


def build_small_model(tokenizer: CLIPTokenizer, size: int) -> BetaCLIP:
    """A small model with random weights, for images of `size` pixels."""
    encoder = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
    vision = encoder | {"num_hidden_layers": 3, "image_size": size, "patch_size": 16}
    text = encoder | {"num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        text[name] = getattr(tokenizer, name)
    config = CLIPConfig(projection_dim=128, vision_config=vision, text_config=text)
    return BetaCLIP(CLIPModel(config))


def from_hugging_face(source: str | Path) -> BetaCLIP:
    """Load a Hugging Face CLIP, with what `export` wrote beside it, if anything."""
    with input_errors(f"{source}: a CLIP cannot be loaded"):
        clip, report = CLIPModel.from_pretrained(
            source, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True)
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(f"{source} lacks {len(missing)} weights of a CLIP, e.g. {missing[0]}")
    positions = clip.config.text_config.max_position_embeddings
    if positions not in (77, CONTEXT):
        raise InputError(f"{source} has {positions} text positions, not 77 or {CONTEXT}")
    folder = Path(source)
    processor_files = ["preprocessor_config.json", "processor_config.json"]
    with input_errors(f"{source}: cannot be read"):
        if not folder.is_dir():
            folder = snapshot_download(source, allow_patterns=[POOLER_FILE, *processor_files])
        statistics = []
        if any(Path(folder, name).is_file() for name in processor_files):
            processor = CLIPImageProcessor.from_pretrained(folder)
            statistics = [processor.image_mean, processor.image_std]
        pooler_file = Path(folder, POOLER_FILE)
        extra_state = load_file(pooler_file) if pooler_file.is_file() else {}

    model = BetaCLIP(clip, *statistics)
    state = model.state_dict()
    loaded = {name: state[name] for name in model.stock_names}  # in place already: not missing
    for name, tensor in extra_state.items():
        is_new = name.startswith(NEW_PREFIX)
        loaded[name.removeprefix(NEW_PREFIX) if is_new else f"pooler.{name}"] = tensor
    model.use_pooler = any(name.startswith("pooler.") for name in loaded)
    load_weights(model, loaded, source)
    return model


def load_weights(model: BetaCLIP, state: dict[str, Tensor], source: str | Path) -> None:
    """Load all weights of a checkpoint. A parameter that neither it nor a stock CLIP has keeps its
    initial value, and is in model.missing_names. Raises InputError if the weights do not fit."""
    with input_errors(f"{source}: the weights do not fit"):
        missing, unknown = model.load_state_dict(state, strict=False)
    model.missing_names = [name for name in missing if name not in model.stock_names
                            and (model.use_pooler or not name.startswith("pooler."))]
    wrong = unknown + [name for name in missing if name in model.stock_names]
    if wrong:
        raise InputError(f"{source}: missing or unknown weights: {', '.join(wrong[:3])}")


# ---- the authors' format -------------------------------------------------------------------------
AUTHORS_CONFIGS = {768: {"vision_config": {"patch_size": 16}}}  # by the image encoder's width
AUTHORS_RENAMES = (  # regular expressions, applied in this order
    (r"^visual\.", "clip.vision_model."), (r"^transformer\.", "clip.text_model."),
    (r"^text_conditioned_patches_block", "pooler"), (r"^logit_scale", "clip.logit_scale"),
    (r"^image_projection", "clip.visual_projection.weight"),
    (r"^text_projection", "clip.text_projection.weight"),
    (r"^ln_final", "clip.text_model.final_layer_norm"),
    (r"^token_embedding", "clip.text_model.embeddings.token_embedding"),
    (r"^positional_embedding_res", f"{POSITION_PREFIX}learned"),
    (r"^positional_embedding$", f"{POSITION_PREFIX}frozen"),
    (r"\.cls_token", ".embeddings.class_embedding"), (r"\.norm_pre", ".pre_layrnorm"),
    (r"\.pos_embed", ".embeddings.position_embedding.weight"),
    (r"\.patch_embed\.proj", ".embeddings.patch_embedding"),
    (r"_model\.norm\.", "_model.post_layernorm."), (r"\.(?:res)?blocks\.", ".encoder.layers."),
    (r"(layers\.\d+)\.(?:norm|ln_)", r"\1.layer_norm"),
    (r"(layers\.\d+)\.attn\.proj", r"\1.self_attn.out_proj"),
    (r"(layers\.\d+)\.attn", r"\1.self_attn"), (r"pooler\.ln_2", "pooler.ln"),
    (r"pooler\.mlp\.c_fc", "pooler.mlp.0"), (r"pooler\.mlp\.c_proj", "pooler.mlp.2"),
    (r"\.c_fc", ".fc1"), (r"\.c_proj", ".fc2"))


def read_checkpoint(path: str | Path, key: str) -> dict:
    """Read a checkpoint with a dict under `key`, without executing pickles. Raises InputError."""
    with (input_errors(f"{path} is not a checkpoint"),
          torch.serialization.safe_globals([argparse.Namespace])):  # the authors' files hold one
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(key), dict):
        raise InputError(f"{path} is not a checkpoint with {key!r} (for a run, pass its folder)")
    return checkpoint


def from_authors(state_dict: dict[str, Tensor], source: str = "the checkpoint") -> BetaCLIP:
    """Build a model from the authors' state_dict. Raises InputError."""
    theirs = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    width = len(theirs.get("image_projection", []))
    if width not in AUTHORS_CONFIGS:
        raise InputError(f"{source} is not the authors' ViT-B/16")
    theirs["visual.cls_token"] = theirs["visual.cls_token"].flatten()              # was [1, 1, C]
    theirs["visual.pos_embed"] = theirs["visual.pos_embed"][0]                 # was [1, 1 + P, C]
    for name in ("image_projection", "text_projection"):
        theirs[name] = theirs[name].T  # they compute x @ W
    # both have 248 rows, of which only these are used
    theirs["positional_embedding"] = theirs["positional_embedding"][:FROZEN_POSITIONS]
    theirs["positional_embedding_res"] = theirs["positional_embedding_res"][FROZEN_POSITIONS:]
    ours = {}
    for name, tensor in theirs.items():
        for pattern, replacement in AUTHORS_RENAMES:
            name = re.sub(pattern, replacement, name)
        if ".qkv." in name:  # q, k and v in one tensor
            for letter, chunk in zip("qkv", tensor.chunk(3), strict=True):
                ours[name.replace("qkv", f"{letter}_proj")] = chunk
        else:
            ours[name] = tensor
    model = BetaCLIP(CLIPModel(CLIPConfig(**AUTHORS_CONFIGS[width])))
    model.use_pooler = True
    load_weights(model, ours, source)
    return model


# ---- export --------------------------------------------------------------------------------------
MODEL_CARD = """\
---
library_name: transformers
pipeline_tag: zero-shot-image-classification
tags: [clip, beta-clip, long-text, fine-grained]
---
# β-CLIP
A CLIP with a {context}-token text encoder, trained from {base} by `{command}`
with the code of a reproduction of [β-CLIP](https://arxiv.org/abs/2512.12678). Results in %:

```
{results}
```

Take the tokenizer from `CLIPProcessor` or `AutoTokenizer`: they straighten curly quotes, as in
training, unlike `CLIPTokenizer`. Fine-grained results need the patch embeddings of that code.

```python
from transformers import CLIPModel, CLIPProcessor

model = CLIPModel.from_pretrained("{folder}")  # on the hub: OWNER/NAME
processor = CLIPProcessor.from_pretrained("{folder}")
inputs = processor(text=["a red car", "a dog"], return_tensors="pt", padding=True, truncation=True)
output = model.get_text_features(**inputs)  # texts may have {context} tokens
print(getattr(output, "pooler_output", output))  # transformers 4 returns the tensor itself
```
"""


def export(model: BetaCLIP, tokenizer: CLIPTokenizer, folder: Path, base: str = "",
           command: str = "", results: str = "") -> None:
    """Write a folder for stock transformers. Its pooler.safetensors has what stock CLIPs lack: the
    pooler and new parameters. The strings are for the model card. Raises InputError."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    clip_state = {name.removeprefix("clip."): state.pop(name) for name in model.stock_names}
    prefix = POSITION_PREFIX.removeprefix("clip.")
    clip_state[f"{prefix}weight"] = torch.cat(
        [clip_state.pop(f"{prefix}frozen"), clip_state.pop(f"{prefix}learned")])
    extra_state = {}
    for name, tensor in state.items():
        if not name.startswith("pooler."):
            extra_state[NEW_PREFIX + name] = tensor
        elif model.use_pooler:
            extra_state[name.removeprefix("pooler.")] = tensor
    # OpenAI's configs have 2 instead, which transformers takes to mean a text's highest id
    model.clip.config.text_config.eos_token_id = tokenizer.eos_token_id
    tokenizer.model_max_length = CONTEXT
    mean, std = model.mean_and_std.tolist()
    processor = CLIPImageProcessor(size=model.image_size, crop_size=model.image_size,
                                   image_mean=mean, image_std=std)
    card = MODEL_CARD.format(base=base, folder=folder, command=command, results=results,
                             context=CONTEXT)
    with input_errors(f"{folder} cannot be written"):
        model.clip.save_pretrained(folder, state_dict=clip_state)
        save_file(extra_state, folder / POOLER_FILE)  # even if empty: an old one may be there
        CLIPProcessor(processor, tokenizer).save_pretrained(folder)
        processor.save_pretrained(folder)  # this and the next line are for transformers 4
        tokenizer.backend_tokenizer.model.save(str(folder))
        # unlike CLIPTokenizer, the class set here keeps the normalizer in tokenizer.json
        file = folder / "tokenizer_config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config["model_input_names"] = ["input_ids", "attention_mask"]  # all that CLIP takes
        file.write_text(json.dumps(config), encoding="utf-8")
        (folder / "README.md").write_text(card, encoding="utf-8")
