"""The model against stock CLIP, and its pieces against their definitions."""

import copy
import itertools
import math
import random
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel, CLIPProcessor

import data
import eval as evaluation
import model as models
from loss import beta_cal, clip_loss


def stock(positions=77):
    torch.manual_seed(0)
    text = dict(vocab_size=600, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=positions,
                bos_token_id=598, eos_token_id=599, pad_token_id=599)
    vision = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)).eval()


def random_texts(*lengths):
    return [torch.cat([torch.tensor([598]), torch.randint(0, 590, (n - 2,)), torch.tensor([599])]) for n in lengths]


def test_positions_golden(golden):
    case = torch.load(golden / "positions.pt", weights_only=True)
    torch.testing.assert_close(models.stretch_positions(case["before"]), case["after"], atol=2e-5, rtol=0)


def test_cls_is_the_stock_image_embedding():
    clip = stock()
    pixels = torch.randn(3, 3, 32, 32)
    cls, patches = models.BetaCLIP(copy.deepcopy(clip)).encode_image(pixels)
    torch.testing.assert_close(cls, clip.get_image_features(pixel_values=pixels).pooler_output, atol=1e-5, rtol=0)
    assert patches.shape == (3, 16, 32)


def test_patches_are_what_a_layer_gives_that_attends_to_itself_alone():
    clip = stock()
    pixels = torch.randn(2, 3, 32, 32)
    _, patches = models.BetaCLIP(clip).encode_image(pixels)
    vision = clip.vision_model
    x = vision.pre_layrnorm(vision.embeddings(pixels))
    for layer in vision.encoder.layers[:-1]:
        x = layer(x, attention_mask=None)
    itself = torch.full((17, 17), -torch.inf).fill_diagonal_(0)[None, None]
    x = vision.encoder.layers[-1](x, attention_mask=itself)
    torch.testing.assert_close(patches, clip.visual_projection(vision.post_layernorm(x))[:, 1:], atol=1e-5, rtol=0)


def test_text_is_the_stock_text_embedding():
    # within the first 20 positions, which stretching leaves alone
    clip = stock()
    text = random_texts(20)
    ours = models.BetaCLIP(copy.deepcopy(clip)).encode_text(text)
    torch.testing.assert_close(ours, clip.get_text_features(input_ids=text[0][None]).pooler_output, atol=1e-5, rtol=0)


def test_encode_text_of_mixed_lengths_equals_one_at_a_time(monkeypatch):
    monkeypatch.setattr(models, "CHUNK_COST", 1)  # many chunks
    model = models.BetaCLIP(stock())
    texts = random_texts(5, 248, 20, 3, 60, 61, 5, 77, 78, 2, 20)
    texts += [texts[3], texts[0]]
    together = model.encode_text(texts)
    torch.testing.assert_close(together, torch.cat([model.encode_text([text]) for text in texts]), atol=1e-5, rtol=0)


def test_equal_texts_are_encoded_once(monkeypatch):
    model = models.BetaCLIP(stock())
    rows, chunk = [], model._encode_chunk
    monkeypatch.setattr(model, "_encode_chunk", lambda texts: rows.extend(texts) or chunk(texts))
    a, b = random_texts(7, 9)
    once = model.encode_text([a, b, a, a])
    assert len(rows) == 2
    torch.testing.assert_close(once[[0, 2, 3]], once[[0, 0, 0]])


def test_pool_equals_one_query_at_a_time():
    torch.manual_seed(0)
    model = models.BetaCLIP(stock())
    text, patches, owner = torch.randn(7, 32), torch.randn(4, 16, 32), torch.tensor([0, 0, 0, 1, 3, 3, 3])  # image 2 has no query
    pooled = model.pooler(text, owner, patches)
    for row, image in enumerate(owner):
        keys = F.normalize(patches[image], dim=-1)[None]
        out = model.pooler.attn(F.normalize(text[row], dim=-1)[None, None], keys, keys)[0][0, 0]
        torch.testing.assert_close(pooled[row], out + model.pooler.mlp(model.pooler.ln(out)), atol=1e-5, rtol=0)


def test_every_parameter_learns_but_the_kept_positions(tiny, tokenizer):
    before = copy.deepcopy(tiny.state_dict())
    queries = [[". ".join(sentences), *sentences[1:], *phrases] for sentences, phrases in (data.describe(data.scene("train", i)) for i in range(4))]
    texts = data.tokenize(tokenizer, sum(queries, []))
    assert max(map(len, texts)) > 77
    owner = torch.arange(4).repeat_interleave(14)
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=1e-3, weight_decay=0.1)
    cls, text, pooled = tiny(torch.randn(4, 3, 64, 64), texts, owner)
    (clip_loss(cls, text[::14], tiny.clip.logit_scale.exp()) + beta_cal(pooled, text, owner, tiny.pooler.logit_scale.exp(), 0.5)).backward()
    optimizer.step()
    after = tiny.state_dict()
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert still == ["clip.text_model.embeddings.position_embedding.kept"]
    assert after[still[0]].shape == (20, 128)


class Payload:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('executed').touch()",)


def test_what_is_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="checkpoint.pt"):
        models.load(tmp_path)
    torch.save({"config": Payload()}, "pickle.pt")
    torch.save({"weights": torch.ones(1)}, "other.pt")
    Path("text.pt").write_text("not torch at all")
    for name, complaint in [("pickle.pt", "not loaded"), ("text.pt", "not loaded"), ("other.pt", "neither a checkpoint")]:
        with pytest.raises(ValueError, match=complaint):
            models.load(name)
    assert not Path("executed").exists()


def test_stock_transformers_load_the_export_and_agree(tiny, tokenizer, tmp_path):
    with torch.no_grad():
        tiny.clip.text_model.embeddings.position_embedding.learned.add_(0.1)  # as if trained
    models.export(tiny, tokenizer, tmp_path)
    assert list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob("*.bin"))
    stock, processor = CLIPModel.from_pretrained(tmp_path), CLIPProcessor.from_pretrained(tmp_path)
    image = data.draw(data.scene("test", 0))
    captions = [". ".join(data.describe(data.scene("test", i))[0]) for i in range(2)]
    inputs = processor(text=captions, images=image, return_tensors="pt", padding=True)
    out = stock(**inputs)
    cls, _ = tiny.encode_image(data.to_pixels(image, 64)[None])
    text = tiny.encode_text(data.tokenize(tokenizer, captions))
    torch.testing.assert_close(out.image_embeds, F.normalize(cls, dim=-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.text_embeds, F.normalize(text, dim=-1), atol=1e-5, rtol=0)
    again = models.load(tmp_path)
    torch.testing.assert_close(again.encode_text(data.tokenize(models.load_tokenizer(tmp_path), captions)), text, atol=1e-5, rtol=0)
    for name, tensor in tiny.pooler.state_dict().items():
        assert torch.equal(again.pooler.state_dict()[name], tensor)


# ---- the whole of it, against the authors' code

@pytest.fixture
def authors(golden):
    return models.load(golden / "authors_checkpoint.pt", heads=4)


@pytest.fixture
def forward(golden):
    case = torch.load(golden / "forward.pt", weights_only=True)
    rows = [row for image in zip(case["text"], case["phrases"]) for level in image for row in level]
    return case, [row[: (row != 0).sum()] for row in rows], torch.arange(3).repeat_interleave(12)


def test_forward_golden(authors, forward):
    case, texts, owner = forward
    cls, text, pooled = authors(case["pixels"], texts, owner)
    _, patches = authors.encode_image(case["pixels"])
    boxes = torch.tensor([box["bbox"] for box in case["boxes"]]) / torch.tensor([[box["width"], box["height"]] * 2 for box in case["boxes"]])
    regions = evaluation.box_embeddings(patches, boxes, torch.arange(3))
    for ours, name in [(cls, "cls"), (patches, "patches"), (F.normalize(text, dim=-1), "text_embed"), (pooled, "pooled"), (regions, "roi")]:
        torch.testing.assert_close(ours.view_as(case[name]), case[name], atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", ["ce", "bce"])
def test_losses_and_gradients_golden(authors, forward, kind):
    case, texts, owner = forward
    cls, text, pooled = authors(case["pixels"], texts, owner)
    clip = clip_loss(cls, text[::12], authors.clip.logit_scale.exp())
    cal = beta_cal(pooled, text, owner, authors.pooler.logit_scale.exp(), 0.5, kind)
    (clip + cal).backward()
    torch.testing.assert_close(clip, case[f"clip_{kind}"], atol=2e-5, rtol=0)
    torch.testing.assert_close(cal, case[f"cal_{kind}"], atol=2e-5, rtol=0)
    # every gradient's norm; in theirs q, k and v are one parameter, and so are their norms put together here
    norms = sorted(norm for norm in case[f"gradnorm_{kind}"].values())
    ours = {}
    for name, p in authors.named_parameters():
        fused = re.sub(r"(vision.*self_attn)\.[qkv]_proj", r"\1.qkv", name)
        ours[fused] = math.hypot(ours.get(fused, 0), p.grad.norm().item())
    assert sorted(ours.values()) == pytest.approx(norms, rel=1e-4, abs=2e-5)


def test_chunks_cost_least(monkeypatch):
    def cost(cuts, lengths):
        return sum(models.CHUNK_COST + (end - start) * lengths[end - 1] for start, end in cuts)

    monkeypatch.setattr(models, "CHUNK_COST", 9)
    for seed in range(20):
        lengths = sorted(random.Random(seed).choices(range(3, 12), k=9))
        partitions = [[0, *middle, 9] for count in range(9) for middle in itertools.combinations(range(1, 9), count)]
        assert cost(models.chunks(lengths), lengths) == min(cost(zip(cut, cut[1:]), lengths) for cut in partitions)


def test_a_batch_of_the_papers_statistics_costs_little_more_than_its_tokens():
    rng = random.Random(0)  # 64 images: a caption of about 130 tokens, 5 sentences of about 25, 27 phrases of about 4.4 (SPEC §5)
    lengths = sorted(max(3, round(rng.gauss(*of))) for of in 64 * [(130, 30), *[(25, 7)] * 5, *[(4.4, 1.3)] * 27])
    cuts = models.chunks(lengths)
    assert [start for start, _ in cuts] == [0, *(end for _, end in cuts[:-1])] and cuts[-1][1] == len(lengths)
    assert sum((end - start) * lengths[end - 1] for start, end in cuts) <= 1.15 * sum(lengths) and len(cuts) < 15


@pytest.mark.parametrize("vision, text, dim, patch", [(768, 512, 512, 16), (1024, 768, 768, 14)], ids=["ViT-B/16", "ViT-L/14"])
def test_the_authors_sizes_are_recognised(golden, vision, text, dim, patch):
    """Their names with the tensors of a real model, but one layer and a small vocabulary."""
    theirs = models.read(golden / "authors_checkpoint.pt")["state_dict"]
    sizes = {"visual": {64: vision, 192: 3 * vision, 256: 4 * vision, 17: (224 // patch) ** 2 + 1}, "text_conditioned": {32: dim, 96: 3 * dim, 128: 4 * dim},
             "image_proj": {64: vision, 32: dim}, "text_proj": {48: text, 32: dim}, "": {48: text, 192: 4 * text}}
    real = {}
    for name, tensor in theirs.items():
        if not re.search(r"\.[12]\.(attn|mlp|ln|norm)", name) or "text_conditioned" in name:
            part = next(part for part in sizes if name.removeprefix("module.").startswith(part))
            real[name] = torch.zeros([sizes[part].get(size, size) for size in tensor.shape])
    real["module.visual.patch_embed.proj.weight"] = torch.zeros(vision, 3, patch, patch)
    config = models.from_authors(real).clip.config
    assert (config.vision_config.image_size, config.vision_config.patch_size, config.projection_dim) == (224, patch, dim)
    assert (config.vision_config.num_attention_heads, config.text_config.num_attention_heads) == (vision // 64, text // 64)
    assert config.vision_config.num_hidden_layers == config.text_config.num_hidden_layers == 1
