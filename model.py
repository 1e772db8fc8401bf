"""β-CLIP's model: a Hugging Face CLIP, 248 text positions, a pooler of patches by text (paper, section 3).

At test time it is a plain CLIP: `cls` against `text`. Patches serve FG-OVD, the pooler serves training.
"""

import argparse
import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from torch.nn.attention.varlen import varlen_attn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.activations import ACT2FN
from transformers.utils import logging

logging.disable_progress_bar()
logging.set_verbosity_error()  # its report of missing weights is a page long; `load` raises an error
FROZEN_POSITIONS = 20  # the first text positions keep their values
CPU_TOKENS = 4096  # in an MLP at a time on a CPU: larger arrays leave the cache, and malloc maps them anew
OPENAI = "openai/clip-vit-base-patch16"  # all of OpenAI's CLIPs share its tokenizer

# ----------------------------------------------------------------------------------------------- modules
def stretch_positions(weight):
    """Text positions for long captions, [77, D] -> [248, D]: 20 rows stay, each other becomes four."""
    rest = weight[FROZEN_POSITIONS:]                                            # [57, D]
    step = torch.cat([rest.diff(dim=0), rest[-1:] - rest[-2:-1]])               # [57, D] to the next row
    quarters = weight.new_tensor([[0], [1 / 4], [1 / 2], [3 / 4]])              # [4, 1]
    between = rest[:, None] + quarters * step[:, None]                          # [57, 4, D]
    return torch.cat([weight[:FROZEN_POSITIONS], between.flatten(0, 1)])

class TextPositions(nn.Module):
    """An nn.Embedding of text positions whose first rows are a buffer: no gradient, no weight decay."""

    def __init__(self, weight):
        super().__init__()
        self.register_buffer("frozen", weight[:FROZEN_POSITIONS].clone())
        self.learned = nn.Parameter(weight[FROZEN_POSITIONS:].clone())

    def forward(self, ids):
        return F.embedding(ids, torch.cat([self.frozen, self.learned]))

class PatchPooler(nn.Module):
    """Each query pools the patches of its image by cross-attention. A residual would leak the query."""

    def __init__(self, dim):
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, num_heads=8, batch_first=True)
        self.ln = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), ACT2FN["quick_gelu"], nn.Linear(4 * dim, dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, text, owner, patches):
        """text [N, D], owner [N] sorted, on the CPU, patches [B, P, D] -> [N, D], of at most K per image."""
        counts = owner.bincount(minlength=len(patches))                         # [B] queries of each image
        place = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]   # [N] of each in its image
        index = tuple(x.to(patches.device, non_blocking=True) for x in (owner, place))
        text, keys = F.normalize(text, dim=-1), F.normalize(patches, dim=-1)
        query = text.new_zeros(len(patches), int(counts.max()), text.shape[1]).index_put(index, text)
        out = self.attn(query, keys, keys, need_weights=False)[0][index]        # [B, K, D] -> [N, D]
        return out + self.mlp(self.ln(out))

# ------------------------------------------------------------------------------ packed texts: no padding
class PackedTexts(NamedTuple):
    """N texts for the text encoder: the n distinct ones, sorted by length, stand end to end as T tokens."""
    tokens: torch.Tensor     # [T]
    positions: torch.Tensor  # [T] place of each token in its text
    offsets: torch.Tensor    # [n + 1] int32: where each text starts, and T
    rows: torch.Tensor       # [N] which of the n texts each of the N is
    groups: list             # (length, number of texts of that length), ascending

    def to(self, device):
        return PackedTexts(*(x.to(device, non_blocking=True) for x in self[:-1]), self.groups)

def pack(texts):
    """A list of N lists of token ids, BOS … EOS -> PackedTexts."""
    texts = [tuple(text) for text in texts]
    distinct = sorted(dict.fromkeys(texts), key=len)
    row = {text: number for number, text in enumerate(distinct)}
    lengths = torch.tensor([len(text) for text in distinct])
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    return PackedTexts(
        tokens=torch.tensor([token for text in distinct for token in text]),
        positions=torch.arange(offsets[-1]) - offsets[:-1].repeat_interleave(lengths),
        offsets=offsets.int(),
        rows=torch.tensor([row[text] for text in texts]),
        groups=sorted(Counter(lengths.tolist()).items()),
    )

@torch.compiler.disable  # the groups differ from batch to batch
def attend(query, key, value, heads, texts, causal):
    """Attention within each text: query, key, value [T, W], or query [n, W], a token of each -> as query."""
    query, key, value = (x.unflatten(-1, (heads, -1)) for x in (query, key, value))      # [T, H, W / H]
    if query.is_cuda and query.dtype != torch.float32:  # FlashAttention takes packed texts as they are
        longest = texts.groups[-1][0]
        starts = texts.offsets if causal else torch.arange(len(texts.offsets), device=query.device).int()
        return varlen_attn(query, key, value, starts, texts.offsets, longest if causal else 1, longest,
                           window_size=(-1, 0 if causal else -1)).flatten(1)
    tokens = [length * count for length, count in texts.groups]  # texts of equal length lie side by side
    asking = tokens if causal else [count for _, count in texts.groups]
    out = []
    for (_, count), *group in zip(texts.groups, query.split(asking), key.split(tokens), value.split(tokens)):
        q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in group)          # [count, H, L, W / H]
        out.append(F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(0, 1))
    return torch.cat(out).flatten(1)

def text_layer(layer, x, texts, eos=None):
    """A transformer layer on packed texts: x [T, W] -> [T, W]; or, for the tokens `eos` [n] alone, [n, W]."""
    attn, h = layer.self_attn, layer.layer_norm1(x)
    x, asking = (x, h) if eos is None else (x[eos], h[eos])
    mixed = attend(attn.q_proj(asking), attn.k_proj(h), attn.v_proj(h), attn.num_heads, texts, eos is None)
    x = x + attn.out_proj(mixed)
    mlp = lambda part: part + layer.mlp(layer.layer_norm2(part))
    return mlp(x) if x.is_cuda else torch.cat([mlp(part) for part in x.split(CPU_TOKENS)])

def image_layer(layer, x):
    """A transformer layer on images: x [B, 1 + P, W] -> [B, 1 + P, W]."""
    return layer(x, attention_mask=None)

def value_only_layer(layer, x):
    """The last layer on images, x [B, 1 + P, W] -> as x: CLS attends as usual, a patch sees itself alone."""
    attn, h = layer.self_attn, layer.layer_norm1(x)
    value = attn.v_proj(h)                                                               # [B, 1 + P, W]
    q, k, v = (y.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)                     # [B, H, L, W / H]
               for y in (attn.q_proj(h[:, :1]), attn.k_proj(h), value))
    cls = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)             # [B, 1, W]
    x = x + attn.out_proj(torch.cat([cls, value[:, 1:]], dim=1))
    return x + layer.mlp(layer.layer_norm2(x))

# -------------------------------------------------------------------------------------------- the model
class BetaCLIP(nn.Module):
    """`clip`, whose 77 text positions become 248 (others stay), and a fresh pooler; changes `clip` itself."""

    def __init__(self, clip):
        super().__init__()
        weight = clip.text_model.embeddings.position_embedding.weight.data
        self.stretched = len(weight) == 77
        weight = stretch_positions(weight) if self.stretched else weight
        clip.text_model.embeddings.position_embedding = TextPositions(weight)
        clip.config.text_config.max_position_embeddings = self.context = len(weight)
        self.dim, self.image_size = clip.config.projection_dim, clip.config.vision_config.image_size
        self.clip, self.pooler = clip, PatchPooler(self.dim)
        self.has_trained_pooler = False
        self.image_layer, self.text_layer = image_layer, text_layer

    def encode_image(self, pixels):
        """pixels [B, 3, H, W] -> cls [B, D], as the stock CLIP's, patches [B, P, D]; not normalised."""
        vision = self.clip.vision_model
        x = vision.pre_layrnorm(vision.embeddings(pixels))                               # [B, 1 + P, W]
        *layers, last = vision.encoder.layers
        for layer in layers:
            x = self.image_layer(layer, x)
        x = value_only_layer(last, x)
        x = self.clip.visual_projection(vision.post_layernorm(x))                        # [B, 1 + P, D]
        return x[:, 0], x[:, 1:]

    def encode_text(self, texts):
        """texts: a list of N 1-D LongTensors, BOS … EOS, or PackedTexts -> [N, D], not normalised."""
        if not isinstance(texts, PackedTexts):
            texts = pack([text.tolist() for text in texts]).to(self.clip.device)
        text = self.clip.text_model
        token, position = text.embeddings.token_embedding, text.embeddings.position_embedding
        x = token(texts.tokens) + position(texts.positions)                              # [T, W]
        *layers, last = text.encoder.layers
        for layer in layers:
            x = self.text_layer(layer, x, texts)
        x = text_layer(last, x, texts, eos=texts.offsets[1:] - 1)                        # [n, W]: EOS alone
        return self.clip.text_projection(text.final_layer_norm(x))[texts.rows]           # [N, D]

    def forward(self, pixels, texts, owner):
        """Images, N queries, the image of each, owner [N] -> cls [B, D], text, pooled [N, D] (or None)."""
        cls, patches = self.encode_image(pixels)
        text = self.encode_text(texts)
        return cls, text, self.pooler(text, owner, patches) if self.has_trained_pooler else None

    def wrap_layers(self, wrap):
        """Wrap what computes a layer, but for the last of each tower, for instance in torch.compile."""
        self.image_layer, self.text_layer = wrap(self.image_layer), wrap(self.text_layer)

# ---------------------------------------------------------------------------------------------- loading
def from_scratch(tokenizer, image_size=64):
    """A small model with random weights and `tokenizer`'s vocabulary, for the built-in scenes."""
    tower = dict(hidden_size=128, intermediate_size=512, num_attention_heads=4)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vision = tower | dict(num_hidden_layers=3, image_size=image_size, patch_size=8)
    text = tower | ids | dict(num_hidden_layers=2, max_position_embeddings=77, vocab_size=len(tokenizer))
    return BetaCLIP(CLIPModel(CLIPConfig(projection_dim=128, vision_config=vision, text_config=text)))

AUTHORS = (  # parts of the authors' parameter names and of ours, replaced in this order
    ("clip.text_conditioned_patches_block", "pooler"), ("pooler.ln_2", "pooler.ln"),
    ("pooler.mlp.c_fc", "pooler.mlp.0"), ("pooler.mlp.c_proj", "pooler.mlp.2"),
    ("visual.", "vision_model."), ("cls_token", "embeddings.class_embedding"), ("norm_pre", "pre_layrnorm"),
    ("pos_embed", "embeddings.position_embedding.weight"), ("patch_embed.proj", "embeddings.patch_embedding"),
    ("model.norm.", "model.post_layernorm."), ("model.blocks", "model.encoder.layers"),
    ("transformer.resblocks", "text_model.encoder.layers"), ("ln_final", "text_model.final_layer_norm"),
    ("token_embedding", "text_model.embeddings.token_embedding"),
    ("positional_embedding_res", "text_model.embeddings.position_embedding.learned"),
    ("positional_embedding", "text_model.embeddings.position_embedding.frozen"),
    ("image_projection", "visual_projection.weight"), ("text_projection", "text_projection.weight"),
    (".attn.proj", ".self_attn.out_proj"), (".attn.", ".self_attn."), ("pooler.self_attn", "pooler.attn"),
    (".norm", ".layer_norm"), (".ln_", ".layer_norm"), ("c_fc", "fc1"), ("c_proj", "fc2"))

def from_authors(state_dict, heads=None):
    """The authors' state_dict -> BetaCLIP, of the tensors' sizes; `heads` where a head is not 64 wide."""
    theirs = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}

    def tower(blocks, width):
        if width % 64 and not heads:
            raise ValueError(f"{blocks} is {width} wide, no multiple of 64: say how many heads it has")
        layers = {name.split(".")[2] for name in theirs if name.startswith(blocks)}
        return dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=len(layers),
                    num_attention_heads=heads or width // 64)

    width, dim = theirs["image_projection"].shape
    patch = theirs["visual.patch_embed.proj.weight"].shape[-1]
    side = math.isqrt(theirs["visual.pos_embed"].shape[1])  # of 1 + side² positions
    vision = tower("visual.blocks", width) | dict(patch_size=patch, image_size=patch * side)
    size, width = theirs["token_embedding.weight"].shape
    text = tower("transformer.resblocks", width) | dict(
        vocab_size=size, bos_token_id=size - 2, eos_token_id=size - 1, max_position_embeddings=248)
    model = BetaCLIP(CLIPModel(CLIPConfig(projection_dim=dim, vision_config=vision, text_config=text)))

    theirs["positional_embedding"] = theirs["positional_embedding"][:FROZEN_POSITIONS]
    theirs["positional_embedding_res"] = theirs["positional_embedding_res"][FROZEN_POSITIONS:]
    ours = {}
    for name, tensor in theirs.items():
        tensor = tensor.T if name.endswith("_projection") else tensor.squeeze()  # cls_token is [1, 1, W]
        name = "clip." + name
        for old, new in AUTHORS:
            name = name.replace(old, new)
        if ".qkv." in name:  # q, k and v, stacked
            ours |= {name.replace("qkv", f"{one}_proj"): rows for one, rows in zip("qkv", tensor.chunk(3))}
        else:
            ours[name] = tensor
    model.load_state_dict(ours)
    model.has_trained_pooler = True
    return model

def read(path, name):
    """The dict in a torch file, which has `name`; no pickle is executed. Raises OSError."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the authors' checkpoints hold one
            saved = torch.load(path, map_location="cpu", weights_only=True)
        return saved | {name: saved[name]}
    except Exception as error:
        raise OSError(f"{path} is no checkpoint with {name}, of tensors and plain values: {error}") from error

def run_model(source):
    """The model in a run's folder, or `source` itself, where it is none."""
    return Path(source, "hf") if Path(source, "hf").is_dir() else source

def load(source, heads=None, size=None):
    """A run's folder, an authors' .pt, or a Hugging Face CLIP (folder or hub name) -> BetaCLIP, on the CPU.

    heads: attention heads of the authors' towers, where a head is not 64 wide
    size:  pixels of an image's side, where not the model's own: its positions are resampled
    """
    if Path(source).suffix == ".pt":
        model = from_authors(read(source, "state_dict")["state_dict"], heads)
    else:
        source, pooler = run_model(source), "pooler.safetensors"
        clip, report = CLIPModel.from_pretrained(source, dtype=torch.float32, attn_implementation="sdpa",
                                                 output_loading_info=True)
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"no whole CLIP: {len(missing)} weights are missing, the first is {missing[0]}")
        model = BetaCLIP(clip)
        folder = Path(source if Path(source).is_dir() else snapshot_download(source, allow_patterns=pooler))
        if (folder / pooler).is_file():
            model.pooler.load_state_dict(load_file(folder / pooler))
            model.has_trained_pooler = True
    if size and size != model.image_size:
        resize_images(model, size)
    return model.eval()

def resize_images(model, size):
    """Let `model` see images of another size: resample its positions, as transformers does."""
    embeddings = model.clip.vision_model.embeddings
    if size % embeddings.patch_size:
        raise ValueError(f"{size} pixels are no multiple of its patches of {embeddings.patch_size}")
    patches = torch.zeros(1, 1 + (size // embeddings.patch_size) ** 2, embeddings.embed_dim)
    weight = embeddings.interpolate_pos_encoding(patches, size, size).detach()[0]        # [1 + P, W]
    embeddings.position_embedding = nn.Embedding.from_pretrained(weight, freeze=False)
    embeddings.register_buffer("position_ids", torch.arange(len(weight))[None], persistent=False)
    embeddings.image_size = model.clip.config.vision_config.image_size = model.image_size = size

def load_tokenizer(source, model):
    """The tokenizer of the model that `load` made of `source`; an authors' .pt has OpenAI's, or its own."""
    source, size = run_model(source), model.clip.config.text_config.vocab_size
    if Path(source).is_file():
        folder = Path(source).parent
        source = folder if (folder / "tokenizer_config.json").is_file() else OPENAI
    tokenizer = CLIPTokenizer.from_pretrained(source)
    if not 256 < len(tokenizer) <= size:  # transformers makes an empty one where it finds no files
        raise ValueError(f"{source} has a tokenizer of {len(tokenizer)} tokens, the model one of {size}")
    tokenizer.backend_tokenizer.no_truncation()  # which may have been saved with it
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer

def export(model, tokenizer, folder, base="", command="", table=""):
    """Write a folder that stock transformers load, a trained pooler beside, and README.md, its hub page."""
    state, name = model.clip.state_dict(), "text_model.embeddings.position_embedding."
    state[name + "weight"] = torch.cat([state.pop(name + "frozen"), state.pop(name + "learned")])
    model.clip.save_pretrained(folder, state_dict=state)
    tokenizer.model_max_length = model.context
    images = CLIPImageProcessor(size=model.image_size, crop_size=model.image_size)
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    if model.has_trained_pooler:
        save_file(model.pooler.state_dict(), Path(folder) / "pooler.safetensors")
    card = Path(__file__).with_name(".github").joinpath("model_card.md").read_text()
    base = f"base_model: {base}\n" if "/" in base and not Path(base).exists() else ""
    Path(folder, "README.md").write_text(card.format(folder=folder, base=base, command=command, table=table))
