"""The model against stock CLIP and the authors' numbers, and its pieces against their definitions."""

import json
import math
import random
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import write
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTextModel

import data
import eval as evaluation
import model as models
from loss import beta_cal, clip_loss
from test_loss import Made

def assert_close(ours, theirs, atol=1e-5):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)

def random_texts(*lengths):
    return [torch.tensor([0, *random.Random(n).choices(range(2, 400), k=n - 2), 1]) for n in lengths]

def stock(folder, **text):
    config = CLIPConfig.from_pretrained(folder)
    config.text_config.update(text)
    return CLIPModel(config).eval()

def losses(model, pixels, texts, owner, kind="ce"):
    cls, text, pooled = model(pixels, texts, owner)
    captions = text[::len(owner) // len(pixels)]  # each image has as many queries
    return (clip_loss(cls, captions, model.clip.logit_scale.exp()),
            beta_cal(pooled, text, owner, model.pooler.logit_scale.exp(), 0.5, kind))

def test_positions_golden(golden):
    case = torch.load(golden / "positions.pt", weights_only=True)
    assert_close(models.stretch_positions(case["before"]), case["after"], atol=2e-5)

def test_the_first_20_positions_are_stock_and_a_patch_attends_to_itself_alone(clip):
    theirs = stock(clip, max_position_embeddings=77, eos_token_id=1)
    (text,), pixels = random_texts(20), torch.randn(2, 3, 64, 64)
    embedding, vision = theirs.get_text_features(text[None]).pooler_output, theirs.vision_model
    model = models.BetaCLIP(theirs)
    assert model.stretched and model.context == 248
    assert_close(model.encode_text([text]), embedding)
    *layers, last = vision.encoder.layers
    x = vision.pre_layrnorm(vision.embeddings(pixels))
    for layer in layers:
        x = layer(x, attention_mask=None)
    x = last(x, attention_mask=torch.full((65, 65), -torch.inf).fill_diagonal_(0)[None, None])
    assert_close(model.encode_image(pixels)[1], theirs.visual_projection(vision.post_layernorm(x))[:, 1:])

def test_packed_texts_equal_one_at_a_time_and_each_distinct_token_is_processed_once(tiny, monkeypatch):
    packed = models.pack([[8, 1, 9], [8, 9], [8, 1, 9], [8, 2, 9], [8, 3, 4, 9]])
    assert packed.tokens.tolist() == [8, 9, 8, 1, 9, 8, 2, 9, 8, 3, 4, 9]
    assert packed.positions.tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 0, 1, 2, 3]
    assert (packed.offsets.tolist(), packed.rows.tolist()) == ([0, 2, 5, 8, 12], [1, 0, 1, 2, 3])
    assert packed.groups == [(2, 1), (3, 2), (4, 1)]
    texts, processed = random_texts(5, 248, 20, 3, 60, 61, 6, 77, 78, 2), []
    texts += [texts[3], texts[0], torch.tensor([0, 7, 1])]
    alone = torch.cat([tiny.encode_text([text]) for text in texts])
    for layer in tiny.clip.text_model.encoder.layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.mlp.fc1):
            part.register_forward_hook(lambda part, inputs, out: processed.append(len(inputs[0])))
    assert_close(tiny.encode_text(texts), alone)
    assert processed == [563] * 3 + [11, 563, 11]  # tokens; in the last layer, EOS of eleven texts
    monkeypatch.setattr(models, "CPU_TOKENS", 100)
    assert_close(tiny.encode_text(texts), alone)
    assert processed[8:14] == [100] * 5 + [63]

@pytest.mark.parametrize("causal", [True, False], ids=["all tokens", "EOS alone"])
def test_flash_attention_is_asked_for_what_the_cpu_computes(monkeypatch, causal):
    class OnGPU(torch.Tensor):
        is_cuda = True

    def naive(query, key, value, starts, key_starts, *longest, window_size):
        assert starts.dtype == key_starts.dtype == torch.int32 and window_size == (-1, 0 if causal else -1)
        asking, lengths = starts.diff().tolist(), key_starts.diff().tolist()
        assert longest == (max(asking), max(lengths))
        out = []
        for q, k, v in zip(query.split(asking), key.split(lengths), value.split(lengths)):
            scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
            future = torch.ones_like(scores).triu(1).bool() & causal
            out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), v))
        return torch.cat(out)

    monkeypatch.setattr(models, "varlen_attn", naive)
    texts = models.pack([text.tolist() for text in random_texts(5, 9, 2, 8, 30)])
    query, *rest = torch.randn(3, len(texts.tokens), 8, dtype=torch.float64)
    inputs = [query if causal else query[texts.offsets[1:] - 1], *rest]
    on_gpu = models.attend(*(x.as_subclass(OnGPU) for x in inputs), 2, texts, causal)
    assert_close(on_gpu.as_subclass(torch.Tensor), models.attend(*inputs, 2, texts, causal), atol=1e-12)

def test_the_text_tower_is_few_operations_whatever_the_lengths(clip, monkeypatch):
    monkeypatch.setattr(models, "attend", lambda q, k, v, *rest: q + (k + v)[:len(q)])
    model = models.BetaCLIP(stock(clip, hidden_size=16, intermediate_size=64, num_hidden_layers=12))
    rng = random.Random(0)  # 64 images: a caption, 5 sentences and 30 phrases of the paper's lengths
    lengths = (max(3, round(rng.gauss(*of))) for of in 64 * [(131, 30), *[(25, 7)] * 5, *[(4.4, 1.3)] * 30])
    packed = models.pack([[0, *rng.choices(range(2, 400), k=length - 2), 1] for length in lengths])
    with Made() as made:
        model.encode_text(packed).sum().backward()
    assert len(packed.groups) > 80 and 400 < made.operations <= 2500  # but for views

def test_the_pooler_equals_one_query_at_a_time(tiny):
    text, patches, owner = torch.randn(7, 128), torch.randn(4, 64, 128), torch.tensor([0, 0, 0, 1, 3, 3, 3])
    alone = [tiny.pooler(text[[i]], torch.tensor([0]), patches[owner[[i]]]) for i in range(7)]
    assert_close(tiny.pooler(text, owner, patches), torch.cat(alone))  # image 2 has no query

@pytest.mark.parametrize("change", ["compile", "checkpoint"])
def test_all_but_the_frozen_positions_learn_and_changed_layers_alike(tiny, tokenizer, change):
    backend, gradients, sizes = CompileCounterWithBackend("aot_eager"), [], []  # it needs no C++ compiler
    wrap = partial(torch.compile, backend=backend) if change == "compile" else (
        lambda layer: partial(checkpoint, layer, use_reentrant=False))
    scenes = data.Scenes(64, (5, 30))
    batch = data.collate([scenes[0, i] for i in range(4)], tokenizer, models.pack)
    for prepare, kept in (lambda: None, []), (lambda: tiny.wrap_layers(wrap), []):
        prepare()
        with saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            total = sum(losses(tiny, data.normalize(batch.pixels), batch.texts, batch.owner))
        sizes.append(sum(kept))
        gradients.append(torch.autograd.grad(total, list(tiny.parameters())))
    assert_close(*gradients, atol=1e-6)
    assert backend.frame_count == 3 if change == "compile" else sizes[1] < 0.7 * sizes[0]
    frozen, = tiny.state_dict().keys() - dict(tiny.named_parameters())
    assert frozen.endswith("position_embedding.frozen") and len(tiny.state_dict()[frozen]) == 20
    assert all(gradient.any() for gradient in gradients[0])

@pytest.mark.parametrize("size", [32, 96])
def test_images_of_another_size_are_seen_as_transformers_sees_them(clip, size):
    pixels, model = torch.randn(2, 3, size, size), models.load(clip, size=size)
    theirs = CLIPModel.from_pretrained(clip).vision_model.embeddings(pixels, interpolate_pos_encoding=True)
    assert_close(model.clip.vision_model.embeddings(pixels), theirs, atol=1e-6)
    with pytest.raises(ValueError, match=f"{size + 4} pixels are no multiple of its patches of 8"):
        models.load(clip, size=size + 4)

def test_stock_transformers_load_the_export_and_agree(tiny, tokenizer, tmp_path):
    with torch.no_grad():
        tiny.clip.text_model.embeddings.position_embedding.learned.add_(0.1)  # as if trained
    models.export(tiny, tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"attn_implementation": "eager"}
    write(tmp_path / "config.json", config)
    image, processor = data.paint(data.scene("test", 0)), CLIPProcessor.from_pretrained(tmp_path)
    captions = ["a red star on a striped card", "a red star " * 100]  # the latter is cut
    inputs = processor(text=captions, images=image, return_tensors="pt", padding=True, truncation=True)
    assert inputs.input_ids.shape == (2, 248)
    out = CLIPModel.from_pretrained(tmp_path)(**inputs)
    alone = CLIPTextModel.from_pretrained(tmp_path)(inputs.input_ids, inputs.attention_mask).pooler_output
    again, pooled = models.load(tmp_path), []
    assert again.clip.config._attn_implementation == "sdpa" and again.has_trained_pooler
    for model, tokenizer in ((tiny, tokenizer), (again, models.load_tokenizer(tmp_path, again))):
        cls, patches = model.encode_image(data.normalize(data.to_pixels(image, 64)[None]))
        text = model.encode_text(models.pack(data.tokenize(tokenizer, captions)))
        pooled.append(model.pooler(text, torch.tensor([0, 0]), patches))
        assert_close(F.normalize(cls, dim=-1), out.image_embeds)
        assert_close(F.normalize(text, dim=-1), out.text_embeds)
        assert_close(text, model.clip.text_projection(alone))
    assert_close(*pooled)

@pytest.mark.parametrize("kind", ["ce", "bce"])
def test_forward_losses_and_gradients_golden(golden, kind):
    model = models.load(golden / "authors_checkpoint.pt", heads=4)
    case = torch.load(golden / "forward.pt", weights_only=True)
    rows = [row for image in zip(case["text"], case["phrases"]) for level in image for row in level]
    texts, owner = [row[:(row != 0).sum()] for row in rows], torch.arange(3).repeat_interleave(12)
    cls, text, pooled = model(case["pixels"], texts, owner)
    patches = model.encode_image(case["pixels"])[1]
    sizes = torch.tensor([[box["width"], box["height"]] * 2 for box in case["boxes"]])
    boxes = torch.tensor([box["bbox"] for box in case["boxes"]]) / sizes
    regions = evaluation.box_embeddings(patches, boxes, torch.arange(3))
    ours = dict(cls=cls, patches=patches, text_embed=F.normalize(text, dim=-1), pooled=pooled, roi=regions)
    for name in ours:
        assert_close(ours[name].view_as(case[name]), case[name], atol=2e-5)
    l_clip, l_cal = losses(model, case["pixels"], texts, owner, kind)
    assert_close((l_clip, l_cal), (case[f"clip_{kind}"], case[f"cal_{kind}"]), atol=2e-5)
    (l_clip + l_cal).backward()
    norms, theirs = {}, case[f"gradnorm_{kind}"]  # in theirs q, k and v are one parameter
    for name, p in model.named_parameters():
        name = re.sub(r"(vision.*self_attn)\.[qkv]_proj", r"\1.qkv", name)
        norms[name] = math.hypot(norms.get(name, 0), p.grad.norm().item())
    assert sorted(norms.values()) == pytest.approx(sorted(theirs.values()), rel=1e-4, abs=2e-5)

@pytest.mark.parametrize("vision, text, dim, patch", [(768, 512, 512, 16), (1024, 768, 768, 14)])
def test_the_authors_sizes_are_recognised(golden, vision, text, dim, patch):
    # ViT-B/16 and L/14: their names with tensors of a real model's sizes, but one layer
    theirs, real = models.read(golden / "authors_checkpoint.pt", "state_dict")["state_dict"], {}
    sizes = {64: vision, 256: 4 * vision, 17: (224 // patch) ** 2 + 1, 48: text, 32: dim, 96: 3 * dim,
             128: 4 * dim}
    for name, tensor in theirs.items():
        sizes[192] = 3 * vision if "visual" in name else 4 * text
        if not re.search(r"\.[12]\.(attn|mlp|ln|norm)", name) or "text_conditioned" in name:
            real[name] = torch.zeros([sizes.get(size, size) for size in tensor.shape])
    real["module.visual.patch_embed.proj.weight"] = torch.zeros(vision, 3, patch, patch)
    config = models.from_authors(real).clip.config
    vit, tower = config.vision_config, config.text_config
    assert (vit.image_size, vit.patch_size, vit.num_attention_heads) == (224, patch, vision // 64)
    assert (config.projection_dim, tower.num_attention_heads) == (dim, text // 64)
    assert vit.num_hidden_layers == tower.num_hidden_layers == 1
