"""The model against stock CLIP and the authors' numbers, and its parts against definitions."""

import gzip
import json
import math
import random
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import SHARED, change_text_config, write_file
from test_loss import CountOperations
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

import data
import eval as evaluation
import model as models
from loss import beta_cal, clip_loss


def assert_close(ours, theirs, atol=1e-5):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def random_texts(lengths):
    """A random text of each length, as token ids; 0 is BOS, 1 is EOS."""
    rng = random.Random(0)
    return [[0, *rng.choices(range(2, 400), k=length - 2), 1] for length in lengths]


def build_stock(folder, **text_config):
    """A stock CLIP like that in a folder, with random weights and another text encoder."""
    config = CLIPConfig.from_pretrained(folder)
    config.text_config.update(text_config)
    return CLIPModel(config).eval()


def compute_losses(model, pixels, texts, image_of_query, caption_index, form="ce"):
    """(L_clip, β-CAL with β = 0.5) of a batch."""
    cls, text, pooled = model(pixels, texts, image_of_query)
    return (clip_loss(cls, text[caption_index], model.clip.logit_scale.exp()),
            beta_cal(pooled, text, image_of_query, model.pooler.logit_scale.exp(), 0.5, form))


def loss_of_scenes(model, tokenizer):
    scenes = data.Scenes(64, (5, 30))
    batch = data.collate([scenes[0, i] for i in range(4)], tokenizer)
    return sum(compute_losses(model, batch.pixels, batch.texts, batch.image_of_query,
                              batch.caption_index))


# ---- encoders and pooler -------------------------------------------------------------------------
def test_positions_golden(golden):
    case = torch.load(golden / "positions.pt", weights_only=True)
    assert_close(models.stretch_positions(case["before"]), case["after"], atol=2e-5)


def test_the_first_20_positions_are_stock_and_a_patch_attends_to_itself_alone(clip_folder):
    stock = build_stock(clip_folder, max_position_embeddings=77, eos_token_id=1)
    texts = random_texts([20])
    embedding = stock.get_text_features(torch.tensor(texts)).pooler_output
    model = models.BetaCLIP(stock)
    assert model.context == 248
    assert_close(model.encode_text(models.pack(texts)), embedding)
    pixels = torch.randn(2, 3, 64, 64)
    vision = stock.vision_model
    *layers, last_layer = vision.encoder.layers
    x = vision.pre_layrnorm(vision.embeddings(pixels))
    for layer in layers:
        x = layer(x, attention_mask=None)
    only_itself = torch.full((65, 65), -torch.inf).fill_diagonal_(0)
    x = last_layer(x, attention_mask=only_itself[None, None])
    theirs = stock.visual_projection(vision.post_layernorm(x))
    assert_close(model.encode_image(pixels)[1], theirs[:, 1:])


def test_packed_texts_equal_one_at_a_time_and_each_distinct_token_is_processed_once(tiny_model):
    packed = models.pack([[8, 1, 9], [8, 9], [8, 1, 9], [8, 2, 9], [8, 3, 4, 9]])
    assert packed.tokens.tolist() == [8, 9, 8, 1, 9, 8, 2, 9, 8, 3, 4, 9]
    assert packed.positions.tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 0, 1, 2, 3]
    assert packed.offsets.tolist() == [0, 2, 5, 8, 12]
    assert packed.distinct.tolist() == [1, 0, 1, 2, 3]
    assert packed.groups == [(2, 1), (3, 2), (4, 1)]
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


class OnGPU(torch.Tensor):
    is_cuda = True  # it says so


@pytest.mark.parametrize("only_eos", [False, True], ids=["all tokens", "EOS alone"])
@pytest.mark.parametrize("capability, num_calls", [((7, 5), 0), ((8, 0), 1)])
def test_flash_attention_is_asked_for_what_the_cpu_computes_from_ampere_on(
        monkeypatch, only_eos, capability, num_calls):
    calls = []

    def naive(query, key, value, starts, key_starts, longest, longest_key, window_size=(-1, -1)):
        calls.append(window_size)
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

    monkeypatch.setattr(models, "varlen_attn", naive)
    monkeypatch.setattr(models, "GPU_CAPABILITY", capability)
    texts = models.pack(random_texts([5, 9, 2, 8, 30]))
    query, key, value = torch.randn(3, len(texts.tokens), 8, dtype=torch.float64)
    if only_eos:
        query = query[texts.offsets[1:] - 1]
    on_cpu = models.attend(query, key, value, 2, texts, only_eos)
    inputs = [x.as_subclass(OnGPU) for x in (query, key, value)]
    on_gpu = models.attend(*inputs, 2, texts, only_eos)
    assert_close(on_gpu.as_subclass(torch.Tensor), on_cpu, atol=1e-12)
    assert len(calls) == num_calls


def test_the_text_encoder_is_few_operations_whatever_the_lengths(clip_folder, monkeypatch):
    def mix(query, key, value, *_):
        return query + (key + value)[:len(query)]

    monkeypatch.setattr(models, "attend", mix)
    stock = build_stock(clip_folder, hidden_size=16, intermediate_size=64, num_hidden_layers=12)
    rng = random.Random(0)  # 64 images: a caption, 5 sentences, 30 phrases of the paper's lengths
    mean_and_deviation = 64 * [(131, 30), *[(25, 7)] * 5, *[(4.4, 1.3)] * 30]
    lengths = [max(3, round(rng.gauss(*numbers))) for numbers in mean_and_deviation]
    packed = models.pack(random_texts(lengths))
    with CountOperations() as count:
        models.BetaCLIP(stock).encode_text(packed).sum().backward()
    assert len(packed.groups) > 80
    assert 400 < count.operations <= 2500  # except views


def test_the_pooler_equals_one_query_at_a_time(tiny_model):
    text = torch.randn(7, 128)
    patches = torch.randn(4, 64, 128)
    images = [0, 0, 0, 1, 3, 3, 3]  # image 2 has no query
    first = torch.tensor([0])
    alone = [tiny_model.pooler(text[[i]], first, patches[[images[i]]]) for i in range(7)]
    assert_close(tiny_model.pooler(text, torch.tensor(images), patches), torch.cat(alone))


def test_all_but_the_frozen_positions_learn_and_checkpointing_saves_memory(tiny_model, tokenizer):
    layers = []

    def call_checkpointed(function, *args):
        layers.append(function)
        return checkpoint(function, *args, use_reentrant=False)

    gradients = []
    saved = []
    for call in (tiny_model.call, call_checkpointed):
        tiny_model.call = call
        count = CountOperations()
        with saved_tensors_hooks(count.save, torch.Tensor.detach):
            loss = loss_of_scenes(tiny_model, tokenizer)
        gradients.append(torch.autograd.grad(loss, list(tiny_model.parameters())))
        saved.append(count.saved)
    assert_close(*gradients, atol=1e-6)
    assert saved[1] < 0.7 * saved[0]
    assert len(layers) == 3  # all but the last of both encoders
    assert all(gradient.any() for gradient in gradients[0])
    [frozen] = tiny_model.state_dict().keys() - dict(tiny_model.named_parameters())
    assert frozen == f"{models.POSITIONS}frozen"
    assert len(tiny_model.state_dict()[frozen]) == 20


@pytest.mark.parametrize("encoder, parts", [("image", ("vision_model.", "visual_projection.")),
                                            ("text", ("text_model.", "text_projection."))])
def test_a_frozen_encoder_gets_no_gradient_and_the_rest_learns(tiny_model, tokenizer, encoder,
                                                               parts):
    tiny_model.freeze(encoder)
    loss_of_scenes(tiny_model, tokenizer).backward()
    for name, param in tiny_model.named_parameters():
        is_frozen = name.removeprefix("clip.").startswith(parts)
        assert param.grad is None if is_frozen else param.grad.any(), name


# ---- export --------------------------------------------------------------------------------------
def test_stock_transformers_load_the_export_as_its_model_card_says_and_agree(
        tiny_model, tokenizer, tmp_path):
    tiny_model.clip.text_model.embeddings.position_embedding.learned.data.add_(0.1)  # as if trained
    models.export(tiny_model, tokenizer, tmp_path, "a base", "python train.py", "T2I R@1 | 87.5")
    config = json.loads((tmp_path / "config.json").read_text())
    write_file(tmp_path / "config.json", config | {"attn_implementation": "eager"})
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "a base" in card and "`python train.py`" in card and "T2I R@1 | 87.5" in card
    names = {}
    exec(re.search("```python\n(.*?)```", card, re.DOTALL)[1], names)
    image = data.draw_scene(data.make_scene("test", 0))
    captions = ["a red star on a striped card", "a red star " * 100]  # the latter is cut
    inputs = names["processor"](image, captions, return_tensors="pt", padding=True, truncation=True)
    assert inputs.input_ids.shape == (2, 248)
    stock = names["model"](**inputs)
    text_encoder = transformers.CLIPTextModel.from_pretrained(tmp_path)
    states = text_encoder(inputs.input_ids, inputs.attention_mask).pooler_output
    loaded, loaded_tokenizer = models.load(tmp_path)
    assert loaded.clip.config._attn_implementation == "sdpa"
    assert loaded.use_pooler
    pooled = []
    for model, its_tokenizer in ((tiny_model, tokenizer), (loaded, loaded_tokenizer)):
        cls, patches = model.encode_image(data.to_pixels(image, 64)[None])
        text = model.encode_text(models.pack(data.tokenize(its_tokenizer, captions)))
        pooled.append(model.pooler(text, torch.tensor([0, 0]), patches))
        assert_close(F.normalize(cls, dim=-1), stock.image_embeds)
        assert_close(F.normalize(text, dim=-1), stock.text_embeds)
        assert_close(text, model.clip.text_projection(states))
    assert_close(*pooled)


def test_a_base_with_its_own_mean_and_std_and_a_legacy_eos_token_is_exported_as_it_is_used(
        clip_folder, tmp_path):
    base = shutil.copytree(clip_folder, tmp_path / "base")
    change_text_config(base, eos_token_id=2)  # stock CLIP then takes the highest id of a text
    (base / "processor_config.json").unlink()
    statistics = {"image_mean": [0.5, 0.25, 0.75], "image_std": [0.5, 0.25, 1]}
    CLIPImageProcessor(size=64, crop_size=64, **statistics).save_pretrained(base)
    model, tokenizer = models.load(base)
    models.export(model, tokenizer, tmp_path / "hf")
    image = data.draw_scene(data.make_scene("test", 0))
    ours = model.encode_image(data.to_pixels(image, 64)[None])[0]
    text = tokenizer("a small red star", return_tensors="pt")  # with ids higher than that of EOS
    ours = [ours, model.encode_text(models.pack(text.input_ids.tolist()))]
    for folder, same_text in ((base, False), (tmp_path / "hf", True)):
        pixels = CLIPImageProcessor.from_pretrained(folder)(image, return_tensors="pt")
        stock = CLIPModel.from_pretrained(folder)
        assert_close(stock.get_image_features(**pixels).pooler_output, ours[0])
        text_features = stock.get_text_features(**text).pooler_output
        assert torch.allclose(text_features, ours[1], atol=1e-5) == same_text
    saved = json.loads((tmp_path / "hf/preprocessor_config.json").read_text())  # transformers 4's
    assert [saved["image_mean"], saved["image_std"]] == list(statistics.values())
    loaded, _ = models.load(tmp_path / "hf")
    assert loaded.mean_and_std.tolist() == list(statistics.values())
    assert_close(loaded.encode_image(data.to_pixels(image, 64)[None])[0], ours[0])


def read_openai_tokenizer():
    """OpenAI's tokenizer, as stock transformers builds it."""
    file = SHARED / "bpe_simple_vocab_16e6.txt.gz"
    if not file.is_file():
        pytest.skip(f"{file} is absent")
    lines = gzip.decompress(file.read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1:48895]]
    letters = list(bytes_to_unicode().values())
    tokens = letters + [f"{letter}</w>" for letter in letters] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)


@pytest.mark.parametrize("build", [data.build_scenes_tokenizer, read_openai_tokenizer])
def test_the_exported_tokenizer_straightens_quotes_however_it_is_read(clip_folder, tmp_path, build):
    base = build()
    straight = base("the dog's \"ball\", a 'red' star").input_ids
    if build == read_openai_tokenizer:
        assert base("a diagram").input_ids == [49406, 320, 22697, 49407]  # as in CLIP's README
    build_stock(clip_folder, vocab_size=len(base)).save_pretrained(tmp_path)
    base.save_pretrained(tmp_path)
    model, tokenizer = models.load(tmp_path)
    folder = tmp_path / "hf"
    models.export(model, tokenizer, folder)
    for reader in (models.load(folder)[1], transformers.AutoTokenizer.from_pretrained(folder),
                   CLIPProcessor.from_pretrained(folder)):
        assert reader(text=["the dog’s “ball”, a ‘red’ star"]).input_ids == [straight]
    # for transformers 4
    rebuilt = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    theirs, ours = (json.loads(x.backend_tokenizer.to_str())["model"] for x in (base, rebuilt))
    assert ours == theirs
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["model_input_names"] == ["input_ids", "attention_mask"]


class Extended(models.BetaCLIP):
    """A model with two new parameters."""
    name = "offset"

    def __init__(self, *args):
        super().__init__(*args)
        self.register_parameter(self.name, nn.Parameter(torch.tensor(1.0)))
        self.clip.text_model.gate = nn.Parameter(torch.tensor(2.0))


@pytest.mark.parametrize("name, use_pooler", [
    ("offset", True), ("offset", False), ("logit_scale", True)])
def test_new_parameters_start_as_built_and_are_saved_and_loaded(clip_folder, tmp_path, monkeypatch,
                                                                name, use_pooler):
    monkeypatch.setattr(Extended, "name", name)
    monkeypatch.setattr(models, "BetaCLIP", Extended)
    model, tokenizer = models.load(clip_folder)
    assert model.new_parameters == [name, "clip.text_model.gate"]
    assert (model.get_parameter(name), model.clip.text_model.gate) == (1, 2)
    model.get_parameter(name).data.add_(10)
    model.clip.text_model.gate.data.add_(10)
    model.use_pooler = use_pooler
    models.export(model, tokenizer, tmp_path)
    _, report = CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    loaded, _ = models.load(tmp_path)
    assert (loaded.get_parameter(name), loaded.clip.text_model.gate) == (11, 12)
    assert (loaded.new_parameters, loaded.use_pooler) == ([], use_pooler)
    monkeypatch.undo()
    with pytest.raises(models.InputError, match="checkpoint and model do not both have .*gate"):
        models.load(tmp_path)  # the model of this file has no such parameter


# ---- the authors' checkpoints --------------------------------------------------------------------
@pytest.mark.parametrize("form, name", [("ce", "ce_checkpoint_10.pt"), ("bce", "renamed.pth")])
def test_an_authors_checkpoint_loads_and_gives_their_numbers(
        golden, authors_tiny, tokenizer, tmp_path, form, name):
    shutil.copy(golden / "authors_checkpoint.pt", tmp_path / name)
    tokenizer.save_pretrained(tmp_path)
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
    captions = torch.tensor([0, 12, 24])
    l_clip, l_cal = compute_losses(model, case["pixels"], texts, image_of_query, captions, form)
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
    assert len(released) == 362
    with torch.device("meta"):
        config = models.from_authors(released).clip.config
    vision, text = config.vision_config, config.text_config
    assert (vision.image_size, vision.patch_size, vision.num_attention_heads) == (224, 16, 12)
    assert (config.projection_dim, text.num_attention_heads) == (512, 8)
    assert vision.num_hidden_layers == text.num_hidden_layers == 12
    with pytest.raises(models.InputError, match="not a ViT-B/16"):
        models.from_authors({"module.image_projection": torch.zeros(1024, 768)})
