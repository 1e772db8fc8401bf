"""β-CLIP's model: a Hugging Face CLIP, 248 text positions, and a pooler of patches by text (SPEC §2).

    cls, patches = model.encode_image(pixels)      # [B, D], [B, P, D]
    text = model.encode_text(texts)                # [N, D]
    pooled = model.pooler(text, owner, patches)    # [N, D]

At test time this is a plain CLIP: `cls` against `text`. Patches serve FG-OVD, the pooler serves training.
"""

import argparse
import itertools
import json
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.utils import logging

logging.disable_progress_bar()
logging.set_verbosity_error()  # its report of weights that are missing is a page long; here they end the program

KEPT = 20            # text positions that stay as they are, and frozen
OPENAI = "openai/clip-vit-base-patch16"  # all of OpenAI's CLIPs have its tokenizer
CHUNK_COST = 400     # what one chunk of texts more costs, in tokens

SCRATCH = {"tiny": 128, "wide": 256}  # widths of the models of the built-in scenes, trained from scratch


def stretch_positions(weight):
    """Text positions for long captions: [77, D] -> [248, D] (SPEC §2).

    The first KEPT rows stay; each other one becomes four, at 0, ¼, ½, ¾ of the way to its right neighbour; the
    last one has none and goes on in the direction of its left difference.
    """
    rest = weight[KEPT:]                                                            # [57, D]
    step = torch.cat([rest[1:] - rest[:-1], rest[-1:] - rest[-2:-1]])               # [57, D]
    quarters = torch.arange(4, dtype=weight.dtype, device=weight.device) / 4
    between = rest[:, None] + quarters[:, None] * step[:, None]                     # [57, 4, D]
    return torch.cat([weight[:KEPT], between.flatten(0, 1)])


def chunks(lengths):
    """Sorted lengths of texts -> (start, end) of the chunks that cost least: padded tokens, and CHUNK_COST for each chunk."""
    ends = [i + 1 for i, length in enumerate(lengths) if i + 1 == len(lengths) or lengths[i + 1] > length]
    best = {0: (0, 0)}  # end of a chunk: cost up to there, start of that chunk
    for end in ends:
        best[end] = min((cost + CHUNK_COST + (end - start) * lengths[end - 1], start) for start, (cost, _) in best.items())
    cut = [len(lengths)]
    while cut[-1]:
        cut.append(best[cut[-1]][1])
    return list(zip(cut[:0:-1], cut[-2::-1]))


class Positions(nn.Module):
    """An nn.Embedding of text positions whose first rows are a buffer: no gradient, no weight decay."""

    def __init__(self, weight):
        super().__init__()
        self.register_buffer("kept", weight[:KEPT].clone())
        self.learned = nn.Parameter(weight[KEPT:].clone())

    @property
    def weight(self):
        return torch.cat([self.kept, self.learned])  # [248, D]

    def forward(self, ids):
        return F.embedding(ids, self.weight)


class PatchPooler(nn.Module):
    """Each query pools the patches of its image by cross-attention. No residual from the query: it would leak."""

    def __init__(self, dim):
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, num_heads=8, batch_first=True)
        self.ln = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), QuickGELU(), nn.Linear(4 * dim, dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, text, owner, patches):
        """text [N, D], owner [N] sorted, patches [B, P, D] -> [N, D]. An owner on the CPU spares a host sync."""
        owner = owner.cpu()
        counts = owner.bincount(minlength=len(patches))                              # [B] queries of each image
        slot = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]         # [N] place among its siblings
        at = (owner * counts.max() + slot).to(text.device, non_blocking=True)        # [N] row in the padded form
        query = F.normalize(text, dim=-1)                                            # [N, D]
        query = query.new_zeros(len(patches) * int(counts.max()), text.shape[-1]).index_copy(0, at, query)
        query = query.unflatten(0, (len(patches), -1))                               # [B, K, D]
        keys = F.normalize(patches, dim=-1)
        out = self.attn(query, keys, keys, need_weights=False)[0].flatten(0, 1)[at]  # [N, D]
        return out + self.mlp(self.ln(out))


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


def attend(query, key, value, heads, mask=None):
    """Attention of `heads` heads, all projected: [B, Q, W], [B, L, W], [B, L, W] -> [B, Q, W]."""
    split = lambda y: y.unflatten(-1, (heads, -1)).transpose(1, 2)                   # [B, L, W] -> [B, heads, L, W / heads]
    return F.scaled_dot_product_attention(split(query), split(key), split(value), mask).transpose(1, 2).flatten(2)


class BetaCLIP(nn.Module):
    """`clip`, 77 text positions of which become 248 (others stay), and a fresh patch pooler. `clip` is changed in place."""

    def __init__(self, clip):
        super().__init__()
        self.clip = clip
        text = clip.text_model.embeddings
        weight = text.position_embedding.weight.data
        self.stretched = len(weight) == 77
        if self.stretched:
            weight = stretch_positions(weight)
        text.position_embedding = Positions(weight)
        text.register_buffer("position_ids", torch.arange(len(weight))[None], persistent=False)
        clip.text_model.config.max_position_embeddings = clip.config.text_config.max_position_embeddings = len(weight)
        self.pooler = PatchPooler(clip.config.projection_dim)

    @property
    def device(self):
        return self.clip.logit_scale.device

    @property
    def pools(self):
        """Whether the pooler is trained: one that is not is frozen, by `load` and with --cal none."""
        return self.pooler.logit_scale.requires_grad

    @property
    def layers(self):
        """The transformer layers that are called whole: all of both towers but the last, which are spelled out below."""
        return [*self.clip.vision_model.encoder.layers[:-1], *self.clip.text_model.encoder.layers[:-1]]

    @property
    def dim(self):
        return self.clip.config.projection_dim

    @property
    def context(self):
        """Tokens of a text, at most."""
        return self.clip.config.text_config.max_position_embeddings

    @property
    def image_size(self):
        return self.clip.config.vision_config.image_size

    def encode_image(self, pixels):
        """pixels [B, 3, H, W] -> cls [B, D], patches [B, P, D], not normalised.

        `cls` is the stock CLIP image embedding. In the last layer patches take the value-only path: no mixing
        between them, so each stays the embedding of its own place.
        """
        vision = self.clip.vision_model
        x = vision.pre_layrnorm(vision.embeddings(pixels))                           # [B, 1 + P, W]
        *layers, last = vision.encoder.layers
        for layer in layers:
            x = layer(x, attention_mask=None)
        attn, h = last.self_attn, last.layer_norm1(x)
        value = attn.v_proj(h)                                                       # [B, 1 + P, W]
        cls = attend(attn.q_proj(h[:, :1]), attn.k_proj(h), value, attn.num_heads)   # [B, 1, W]
        x = x + attn.out_proj(torch.cat([cls, value[:, 1:]], dim=1))
        x = x + last.mlp(last.layer_norm2(x))
        x = self.clip.visual_projection(vision.post_layernorm(x))                    # [B, 1 + P, D]
        return x[:, 0], x[:, 1:]

    def encode_text(self, texts):
        """texts: list of N 1-D LongTensors, BOS … EOS, best on the CPU -> [N, D], not normalised.

        Equal texts are encoded once, and texts of like length together: the encoder is causal, so a text costs
        its own length and what pads it changes nothing. The last layer works on EOS alone: nothing else is read.
        """
        texts = [tuple(text.tolist()) for text in texts]
        unique = sorted(dict.fromkeys(texts), key=len)
        embeddings = [self._encode_chunk(unique[start:end]) for start, end in chunks([len(text) for text in unique])]
        place = {text: row for row, text in enumerate(unique)}
        rows = torch.tensor([place[text] for text in texts])                         # [N]
        return torch.cat(embeddings)[rows.to(self.device, non_blocking=True)]

    def _encode_chunk(self, texts):
        """Tuples of token ids of like length -> [n, D]."""
        length = torch.tensor([len(text) for text in texts])
        pinned = self.device.type == "cuda"  # else the copy of a large chunk would wait for the GPU
        ids = torch.zeros(len(texts), len(texts[-1]), dtype=torch.long, pin_memory=pinned)  # [n, L]; the last is the longest
        there = torch.arange(ids.shape[1]) < length[:, None]                         # [n, L]
        ids[there] = torch.tensor(list(itertools.chain.from_iterable(texts)))
        eos = (torch.arange(len(texts)) * ids.shape[1] + length - 1).to(self.device, non_blocking=True)
        there = there[:, None, None].to(self.device, non_blocking=True)              # [n, 1, 1, L]
        text = self.clip.text_model
        x = text.embeddings(input_ids=ids.to(self.device, non_blocking=True))        # [n, L, W]
        *layers, last = text.encoder.layers
        for layer in layers:
            x = layer(x, attention_mask=None, is_causal=True)
        attn, h = last.self_attn, last.layer_norm1(x)                                # in the last layer only EOS asks
        x, query = x.flatten(0, 1)[eos], attn.q_proj(h.flatten(0, 1)[eos])           # [n, W], [n, W]
        x = x + attn.out_proj(attend(query[:, None], attn.k_proj(h), attn.v_proj(h), attn.num_heads, there)[:, 0])
        x = x + last.mlp(last.layer_norm2(x))
        return self.clip.text_projection(text.final_layer_norm(x))

    def forward(self, pixels, texts, owner):
        """A training step's embeddings; `texts` are the queries of all images, `owner` their images, sorted.

        Returns cls [B, D], text [N, D], pooled [N, D] (None where the pooler is frozen).
        """
        cls, patches = self.encode_image(pixels)
        text = self.encode_text(texts)
        return cls, text, self.pooler(text, owner, patches) if self.pools else None


def tiny(tokenizer, width=SCRATCH["tiny"]):
    """The model of the built-in scenes, from scratch, for the vocabulary of `tokenizer`.

    Its pooler starts near the mean of the patches: from scratch nothing else ties the space of what is pooled to the
    space of the patches, which FG-OVD's protocol reads. A pretrained CLIP's patches have their place already.
    """
    model = BetaCLIP(CLIPModel(tiny_config(tokenizer, width)))
    attn, mlp = model.pooler.attn, model.pooler.mlp
    nn.init.eye_(attn.in_proj_weight.data[2 * width:])  # the rows of the values
    nn.init.eye_(attn.out_proj.weight)
    mlp[-1].weight.data.mul_(0.1)
    return model


def tiny_config(tokenizer, width):
    """Three layers that see 64 x 64 pixels, two that read 77 tokens."""
    tower = dict(hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 32)
    ids = dict(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
               pad_token_id=tokenizer.pad_token_id)
    return CLIPConfig(projection_dim=width, vision_config=tower | dict(num_hidden_layers=3, image_size=64, patch_size=8),
                      text_config=tower | ids | dict(num_hidden_layers=2, max_position_embeddings=77))


def pretrained(name):
    """A Hugging Face CLIP, hub name or folder, with stretched positions and a fresh pooler. OSError where there is none."""
    if not Path(name).is_dir() and name.count("/") != 1:
        raise OSError("neither a folder nor a hub name (OWNER/NAME)")  # at once, where the hub would be asked for minutes
    clip, report = CLIPModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{len(missing)} of its weights are missing, the first is {missing[0]}: no CLIP, or not all of one")
    return BetaCLIP(clip)


AUTHORS = (  # parts of their names (SPEC §8), and of Hugging Face's
    ("visual.cls_token", "vision_model.embeddings.class_embedding"),
    ("visual.pos_embed", "vision_model.embeddings.position_embedding.weight"),
    ("visual.patch_embed.proj", "vision_model.embeddings.patch_embedding"), ("visual.norm_pre", "vision_model.pre_layrnorm"),
    ("visual.norm.", "vision_model.post_layernorm."), ("visual.blocks", "vision_model.encoder.layers"),
    ("transformer.resblocks", "text_model.encoder.layers"), ("token_embedding", "text_model.embeddings.token_embedding"),
    ("ln_final", "text_model.final_layer_norm"), (".attn.proj", ".self_attn.out_proj"), (".attn.", ".self_attn."), (".norm1", ".layer_norm1"),
    (".norm2", ".layer_norm2"), (".ln_1", ".layer_norm1"), (".ln_2", ".layer_norm2"), ("c_fc", "fc1"), ("c_proj", "fc2"),
)
AUTHORS_POOLER = (("ln_2", "ln"), ("mlp.c_fc", "mlp.0"), ("mlp.c_proj", "mlp.2"))


def from_authors(theirs, heads=None):
    """The authors' state_dict (SPEC §8) -> BetaCLIP. Sizes are the tensors'; `heads` where a head is not 64 wide."""
    theirs = {name.removeprefix("module."): tensor for name, tensor in theirs.items()}
    ours, pooler = {}, {}
    for name, tensor in theirs.items():
        if name.startswith("text_conditioned_patches_block."):
            name = name.removeprefix("text_conditioned_patches_block.")
            for old, new in AUTHORS_POOLER:
                name = name.replace(old, new)
            pooler[name] = tensor
            continue
        for old, new in AUTHORS:
            name = name.replace(old, new)
        if ".qkv." in name:
            ours |= {name.replace("qkv", part + "_proj"): rows for part, rows in zip("qkv", tensor.chunk(3))}
        else:
            ours[name] = tensor
    ours["visual_projection.weight"] = ours.pop("image_projection").T
    ours["text_projection.weight"] = ours.pop("text_projection").T
    ours["vision_model.embeddings.class_embedding"] = ours["vision_model.embeddings.class_embedding"].flatten()
    patches = ours["vision_model.embeddings.position_embedding.weight"] = ours["vision_model.embeddings.position_embedding.weight"][0]
    fixed, learned = ours.pop("positional_embedding"), ours.pop("positional_embedding_res")
    ours["text_model.embeddings.position_embedding.weight"] = torch.cat([fixed[:KEPT], learned[KEPT:]])

    def sizes(part, width):
        if width % 64 and not heads:
            raise ValueError(f"{part} is {width} wide, no multiple of 64: say how many heads it has, as in load(path, heads=4)")
        layers = sum(name.startswith(f"{part}.encoder.layers.") and name.endswith("fc1.bias") for name in ours)
        return dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads or width // 64)

    (dim, vision_width), (_, text_width) = ours["visual_projection.weight"].shape, ours["text_projection.weight"].shape
    patch = ours["vision_model.embeddings.patch_embedding.weight"].shape[-1]
    vocabulary = len(ours["text_model.embeddings.token_embedding.weight"])
    vision = sizes("vision_model", vision_width) | dict(patch_size=patch, image_size=patch * math.isqrt(len(patches) - 1))
    text = sizes("text_model", text_width) | dict(vocab_size=vocabulary, bos_token_id=vocabulary - 2,
                                                  eos_token_id=vocabulary - 1, max_position_embeddings=len(fixed))
    clip = CLIPModel(CLIPConfig(projection_dim=dim, vision_config=vision, text_config=text))
    clip.load_state_dict(ours)
    model = BetaCLIP(clip)
    model.pooler.load_state_dict(pooler)
    return model


def read(path):
    """A torch file -> the dict that it holds; tensors and plain values only: nothing pickled is executed. ValueError for any other file."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the authors' checkpoints hold one
            saved = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(saved, dict) or not saved:
            raise TypeError("no dict, or an empty one")
        return saved
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: no checkpoint, or one that holds more than tensors and plain values: not loaded") from error


def newest(run):
    """The last checkpoint of a run's folder: checkpoint.pt, or previous.pt where a kill left that alone."""
    run = Path(run)
    return run / "previous.pt" if (run / "previous.pt").exists() and not (run / "checkpoint.pt").exists() else run / "checkpoint.pt"


def load(source, heads=None):
    """A run's folder, an authors' .pt, or a Hugging Face CLIP (folder or hub name) -> BetaCLIP on the CPU, ready for eval.

    `heads`: attention heads of the authors' towers, where a head is not 64 wide.
    Raises OSError where nothing is, ValueError where something else is; what torch and transformers raise of broken weights.
    """
    path = Path(source)
    if not path.exists() or (path / "config.json").is_file():
        model, trained = pretrained(source), (path / "pooler.safetensors").is_file()
        if trained:
            model.pooler.load_state_dict(load_file(path / "pooler.safetensors"))
        model.pooler.requires_grad_(trained)
        return model.eval()
    saved = read(newest(path) if path.is_dir() else path)
    if "config" in saved:
        model = BetaCLIP(CLIPModel(CLIPConfig(**json.loads(saved["config"]))))
        model.load_state_dict(saved["model"])
        model.pooler.requires_grad_(saved["args"]["cal"] != "none")
    elif any(name.endswith("positional_embedding_res") for name in saved.get("state_dict", ())):
        model = from_authors(saved["state_dict"], heads)
    else:
        raise ValueError(f"{path}: neither a checkpoint of train.py nor one of the authors'")
    return model.eval()


def export(model, tokenizer, folder):
    """Write a folder that stock transformers load: CLIPModel with 248 positions, tokenizer, processor; a trained pooler is beside it."""
    name, state = "text_model.embeddings.position_embedding.", model.clip.state_dict()
    state[name + "weight"] = torch.cat([state.pop(name + "kept"), state.pop(name + "learned")])
    clip = CLIPModel(model.clip.config)
    clip.load_state_dict(state)
    clip.save_pretrained(folder)
    tokenizer.model_max_length = model.context
    size = model.image_size
    images = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    if model.pools:
        save_file(model.pooler.state_dict(), Path(folder) / "pooler.safetensors")


def load_tokenizer(source, model=None):
    """The tokenizer that belongs to the model that `load` makes of the same source. OSError where there is none.

    ValueError where it has more tokens than `model`.

    An authors' .pt comes without one: it is OpenAI's, read from the folder of the .pt, or else from the hub.
    """
    name = source
    if Path(source).is_file():
        beside = Path(source).parent
        name = beside if (beside / "tokenizer_config.json").is_file() else OPENAI
    tokenizer = CLIPTokenizer.from_pretrained(name)
    if len(tokenizer) < 512:  # the bytes alone are so many; transformers makes an empty one where it finds no files
        raise OSError("no tokenizer in it" if name == source else
                      f"its tokenizer, {OPENAI}'s, cannot be fetched: save that tokenizer's files in {beside}")
    tokenizer.backend_tokenizer.no_truncation()  # which may have been saved with it
    tokenizer.backend_tokenizer.no_padding()
    if model and len(tokenizer) > (size := model.clip.config.text_config.vocab_size):
        raise ValueError(f"its tokenizer has {len(tokenizer)} tokens, the model {size}: they do not belong together")
    return tokenizer
