"""The model against stock CLIP and the authors' numbers, and its parts against definitions."""

import json
import math
import random
import re
import shutil
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import AUTHORS_TINY, change_text_config
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

import data
import eval as evaluation
import model as models
from loss import beta_cal, clip_loss

assert_close = partial(torch.testing.assert_close, atol=1e-5, rtol=0)


def random_texts(lengths):
    """A random text of each length, as token ids; 0 is BOS, 1 is EOS."""
    rng = random.Random(0)
    return [[0, *rng.choices(range(2, 400), k=length - 2), 1] for length in lengths]


# ---- encoders and pooler -------------------------------------------------------------------------
def test_positions_are_stretched_as_the_authors_do_and_the_first_20_are_stock(golden):
    case = torch.load(golden / "positions.pt", weights_only=True)
    assert_close(models.stretch_positions(case["before"]), case["after"], atol=2e-5)
    stock = CLIPModel(CLIPConfig(**AUTHORS_TINY)).eval()  # with 77 positions, and 999 as EOS
    texts = random_texts([20])
    texts[0][-1] = 999
    embedding = stock.get_text_features(torch.tensor(texts)).pooler_output
    model = models.BetaCLIP(stock)
    assert_close(model.encode_text(models.pack(texts)), embedding)


def test_packed_texts_equal_one_at_a_time_and_each_distinct_token_is_processed_once(tiny_model):
    texts = random_texts([5, 248, 20, 3, 60, 61, 6, 77, 78, 2])
    texts += [texts[3], texts[0], [0, 7, 1]]
    alone = torch.cat([tiny_model.encode_text(models.pack([text])) for text in texts])
    processed = []

    def note_tokens(module, inputs, output):
        processed.append(len(inputs[0]))

    for layer in tiny_model.clip.text_model.encoder.layers:
        for module in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.mlp.fc1):
            module.register_forward_hook(note_tokens)
    assert_close(tiny_model.encode_text(models.pack(texts)), alone)
    assert processed == [563] * 3 + [11, 563, 11]  # tokens; in the last layer, EOS of eleven texts


@pytest.mark.parametrize("only_eos", [False, True], ids=["all tokens", "EOS alone"])
def test_flash_attention_is_asked_for_what_the_cpu_computes_from_ampere_on(monkeypatch, only_eos):
    def naive(query, key, value, starts, key_starts, longest, longest_key, window_size=(-1, -1)):
        assert starts.dtype == key_starts.dtype == torch.int32
        counts = starts.diff().tolist()
        lengths = key_starts.diff().tolist()
        assert (longest, longest_key) == (max(counts), max(lengths))
        assert window_size == (-1, -1 if only_eos else 0)
        out = []
        for q, k, v in zip(query.split(counts), key.split(lengths), value.split(lengths),
                           strict=True):
            scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
            is_later = torch.ones_like(scores).triu(1).bool() & (not only_eos)
            weights = scores.masked_fill(is_later, -torch.inf).softmax(dim=-1)
            out.append(torch.einsum("hqk,khd->qhd", weights, v))
        return torch.cat(out)

    flash_attention = mock.Mock(wraps=naive)
    monkeypatch.setattr(models, "varlen_attn", flash_attention)
    texts = models.pack(random_texts([5, 9, 2, 8, 30]))
    query, key, value = torch.randn(3, len(texts.tokens), 8, dtype=torch.float64)
    if only_eos:
        query = query[texts.offsets[1:] - 1]
    on_cpu = models.attend(query, key, value, 2, texts, only_eos)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # tensors say so
    for capability, num_calls in (((7, 5), 0), ((8, 0), 1)):
        monkeypatch.setattr(models, "GPU_CAPABILITY", capability)
        on_gpu = models.attend(query, key, value, 2, texts, only_eos)
        assert_close(on_gpu, on_cpu, atol=1e-12)
        assert flash_attention.call_count == num_calls


def test_the_pooler_equals_one_query_at_a_time(tiny_model):
    text = torch.randn(7, 128)
    patches = torch.randn(4, 16, 128)
    images = [0, 0, 0, 1, 3, 3, 3]  # image 2 has no query
    alone = [tiny_model.pooler(text[[i]], torch.tensor([0]), patches[[images[i]]])
             for i in range(7)]
    assert_close(tiny_model.pooler(text, torch.tensor(images), patches), torch.cat(alone))


# ---- export --------------------------------------------------------------------------------------
def test_stock_transformers_load_the_export_as_its_model_card_says_and_agree(clip_folder, tmp_path):
    base = shutil.copytree(clip_folder, tmp_path / "base")
    change_text_config(base, eos_token_id=2)  # stock CLIP then takes the highest id of a text
    (base / "processor_config.json").unlink()
    statistics = {"image_mean": [0.5, 0.25, 0.75], "image_std": [0.5, 0.25, 1]}
    CLIPImageProcessor(size=64, crop_size=64, **statistics).save_pretrained(base)
    model, tokenizer = models.load(base)
    model.clip.text_model.embeddings.position_embedding.learned.data.add_(0.1)  # as if trained
    folder = tmp_path / "hf"
    models.export(model, tokenizer, folder, "a base", "python train.py", "T2I R@1 | 87.5")
    saved = json.loads((folder / "preprocessor_config.json").read_text())  # for transformers 4
    assert [saved["image_mean"], saved["image_std"]] == list(statistics.values())
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "a base" in card and "`python train.py`" in card and "T2I R@1 | 87.5" in card
    names = {}
    exec(re.search("```python\n(.*?)```", card, re.DOTALL)[1], names)
    image = data.draw_scene(data.make_scene("test", 0))
    captions = ["a red circle on a striped card", "a red circle " * 100]  # the latter is cut
    inputs = names["processor"](image, captions, return_tensors="pt", padding=True, truncation=True)
    assert inputs.input_ids.shape == (2, 248)
    assert inputs.input_ids.max() > tokenizer.eos_token_id
    stock = names["model"](**inputs)
    text_encoder = transformers.CLIPTextModel.from_pretrained(folder)
    states = text_encoder(inputs.input_ids, inputs.attention_mask).pooler_output
    pooled = []
    for ours, its_tokenizer in ((model, tokenizer), models.load(folder)):
        assert ours.mean_and_std.tolist() == list(statistics.values())
        cls, patches = ours.encode_image(data.to_pixels(image, 64)[None])
        text = ours.encode_text(models.pack(data.tokenize(its_tokenizer, captions)))
        pooled.append(ours.pooler(text, torch.tensor([0, 0]), patches))
        assert_close(F.normalize(cls, dim=-1), stock.image_embeds)
        assert_close(F.normalize(text, dim=-1), stock.text_embeds)
        assert_close(text, ours.clip.text_projection(states))
    assert_close(*pooled)


def test_the_exported_tokenizer_straightens_quotes_however_it_is_read(clip_folder, tmp_path):
    letters = list(bytes_to_unicode().values())
    merges = [("d", "o"), ("do", "g</w>"), ("'", "s</w>"), ("#", "#")]
    tokens = letters + [f"{letter}</w>" for letter in letters] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    stock = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    straight = stock("the dog's \"ball\", a 'red' star").input_ids
    base = shutil.copytree(clip_folder, tmp_path / "base")
    change_text_config(base, vocab_size=len(stock))
    stock.save_pretrained(base)
    model, tokenizer = models.load(base)
    folder = tmp_path / "hf"
    models.export(model, tokenizer, folder)
    for reader in (models.load(folder)[1], transformers.AutoTokenizer.from_pretrained(folder),
                   CLIPProcessor.from_pretrained(folder)):
        assert reader(text=["the dog’s “ball”, a ‘red’ star"]).input_ids == [straight]
    # for transformers 4
    rebuilt = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    theirs, ours = (json.loads(x.backend_tokenizer.to_str())["model"] for x in (stock, rebuilt))
    assert ours == theirs
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["model_input_names"] == ["input_ids", "attention_mask"]


class Extended(models.BetaCLIP):
    def __init__(self, *args):
        super().__init__(*args)
        self.logit_scale = torch.nn.Parameter(torch.tensor(1.0))  # the pooler, too, has one
        self.clip.text_model.gate = torch.nn.Parameter(torch.tensor(2.0))


@pytest.mark.parametrize("use_pooler", [True, False])
def test_new_parameters_are_as_built_and_are_saved(clip_folder, tmp_path, monkeypatch, use_pooler):
    monkeypatch.setattr(models, "BetaCLIP", Extended)
    model, tokenizer = models.load(clip_folder)
    assert model.missing_names == ["logit_scale", "clip.text_model.gate"]
    assert (model.logit_scale, model.clip.text_model.gate) == (1, 2)
    model.logit_scale.data.add_(10)
    model.clip.text_model.gate.data.add_(10)
    model.use_pooler = use_pooler
    models.export(model, tokenizer, tmp_path)
    _, report = CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    loaded, _ = models.load(tmp_path)
    assert (loaded.logit_scale, loaded.clip.text_model.gate) == (11, 12)
    assert (loaded.missing_names, loaded.use_pooler) == ([], use_pooler)
    monkeypatch.undo()
    with pytest.raises(models.InputError, match="missing or unknown weights: .*gate"):
        models.load(tmp_path)  # the model of this file has no such parameter


# ---- the authors' checkpoints --------------------------------------------------------------------
@pytest.mark.parametrize("form, name", [("ce", "ce_checkpoint_10.pt"), ("bce", "renamed.pth")])
def test_an_authors_checkpoint_loads_and_gives_their_numbers(
        golden, authors_tiny, clip_folder, tmp_path, monkeypatch, form, name):
    shutil.copy(golden / "authors_checkpoint.pt", tmp_path / name)
    monkeypatch.setattr(models, "OPENAI_B16", str(clip_folder))
    model, _ = models.load(tmp_path / name)
    case = torch.load(golden / "forward.pt", weights_only=True)
    rows = []
    for caption_and_sentences, phrases in zip(case["text"], case["phrases"], strict=True):
        rows += [*caption_and_sentences, *phrases]
    texts = models.pack([row[:row.count_nonzero()].tolist() for row in rows])
    image_of_query = torch.arange(3).repeat_interleave(12)
    cls, text, pooled = model(case["pixels"], texts, image_of_query)
    patches = model.encode_image(case["pixels"])[1]
    regions = []
    for patches_of_image, box in zip(patches, case["boxes"], strict=True):
        size = torch.tensor([box["width"], box["height"]] * 2)
        regions.append(evaluation.embed_box(patches_of_image, torch.tensor(box["bbox"]) / size))
    ours = {"cls": cls, "patches": patches, "text_embed": F.normalize(text, dim=-1),
            "pooled": pooled, "roi": torch.stack(regions)}
    for key, tensor in ours.items():
        assert_close(tensor.view_as(case[key]), case[key], atol=2e-5)
    l_clip = clip_loss(cls, text[[0, 12, 24]], model.clip.logit_scale.exp())
    l_cal = beta_cal(pooled, text, image_of_query, model.pooler.logit_scale.exp(), 0.5, form)
    assert_close((l_clip, l_cal), (case[f"clip_{form}"], case[f"cal_{form}"]), atol=2e-5)
    (l_clip + l_cal).backward()
    norms = {}
    for key, param in model.named_parameters():  # in theirs, q, k and v are one parameter
        key = re.sub(r"(vision.*self_attn)\.[qkv]_proj", r"\1.qkv", key)
        norms[key] = math.hypot(norms.get(key, 0), param.grad.norm().item())
    theirs = sorted(case[f"gradnorm_{form}"].values())
    assert sorted(norms.values()) == pytest.approx(theirs, rel=1e-4, abs=2e-5)


def test_a_checkpoint_of_the_released_size_is_a_vit_b_16(golden):
    tiny = models.read_checkpoint(golden / "authors_checkpoint.pt", "state_dict")["state_dict"]
    sizes = {64: 768, 256: 3072, 17: 197, 48: 512, 32: 512, 96: 1536, 128: 2048, 1000: 49408}
    released = {}  # tiny's names, in 12 layers, with tensors of the real sizes, but no values
    for name, tensor in tiny.items():
        sizes[192] = 3 * 768 if "visual" in name else 4 * 512
        shape = [sizes.get(size, size) for size in tensor.shape]
        for layer in range(12):
            deeper = re.sub(r"blocks\.0\.", f"blocks.{layer}.", name)
            released[deeper] = torch.zeros(shape, device="meta")
    with torch.device("meta"):
        config = models.from_authors(released).clip.config  # names and sizes must fit
    assert config.vision_config.num_attention_heads == 12
    assert config.text_config.num_attention_heads == 8
    with pytest.raises(models.InputError, match="not the authors' ViT-B/16"):
        models.from_authors({"module.image_projection": torch.zeros(1024, 768)})
