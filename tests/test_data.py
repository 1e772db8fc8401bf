"""Scenes, the pixels of an image, and the way of a sample from its index to a batch."""

import random
import subprocess
import sys
from collections import defaultdict

import pytest
import torch
from conftest import ROOT, make_image
from PIL import Image, ImageColor
from PIL.Image import Transpose
from torchvision import transforms
from transformers import CLIPImageProcessor

import data
import eval as evaluation

# by EXIF orientation: how a camera that is held so turns an upright image before it stores it
TURNS = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
         5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_90, 7: Transpose.TRANSVERSE,
         8: Transpose.ROTATE_270}


def test_no_scene_of_one_split_is_in_another():
    captions = {}
    for split, count in data.NUM_SCENES.items():
        scenes = [data.make_scene(split, index) for index in range(count)]
        captions[split] = {". ".join(data.describe_scene(scene)[0]) for scene in scenes}
    assert len(captions["val"]) == data.NUM_SCENES["val"]
    assert len(captions["test"]) == data.NUM_SCENES["test"]
    assert not captions["val"] & captions["test"]
    assert not captions["train"] & (captions["val"] | captions["test"])
    assert data.make_scene("train", 7) == data.make_scene("train", 7)


def test_members_of_a_group_differ_in_one_attribute_from_the_original():
    for first in range(0, 80, data.GROUP):
        group = [data.make_scene("test", first + member) for member in range(data.GROUP)]
        for other in group[1:]:
            changes = []
            for before, after in zip(group[0], other, strict=True):
                changes += [name for name in data.ATTRIBUTES if before[name] != after[name]]
            assert len(changes) == 1
        assert len({data.draw_scene(scene).tobytes() for scene in group}) == data.GROUP


def test_the_tokenizer_has_a_token_for_each_word_and_captions_are_long(tokenizer):
    samples = data.Scenes(data.PICTURE_PIXELS, (5, 8))
    for index in range(100):
        texts = [text for text, _ in samples[0, index][1]]
        texts += data.describe_scene(data.make_scene("test", index))[0]
        all_ids = data.tokenize(tokenizer, texts, [999] * len(texts))
        for text, ids in zip(texts, all_ids, strict=True):
            assert len(ids) - 2 == len(text.replace(".", " .").split())
        assert 77 < len(all_ids[0]) < 248
    ids = data.tokenize(tokenizer, ["a zebra, 雪!"])[0]  # other words are bytes
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "azebra,雪!"


def test_the_tokenizer_is_the_same_in_every_process(tokenizer):
    vocab = tokenizer.get_vocab()
    code = f"import data; print(data.build_scenes_tokenizer().get_vocab() == {vocab})"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "True\n"


def test_boxes_are_the_cards_and_wrong_descriptions_differ_as_their_difficulty_says():
    rows = [row for row in evaluation.read_scenes(None) if row.box]
    names = [*evaluation.DIFFICULTIES, "pointing"]
    assert len(rows) == len(names) * data.NUM_SCENES["test"]  # four boxes in each original
    for number, row in enumerate(rows):
        box_number, level = divmod(number, len(names))
        group, quarter = divmod(box_number, 4)
        scene = data.make_scene("test", group * data.GROUP)
        x, y = 32 * (quarter % 2), 32 * (quarter // 2)
        assert row.box == (x, y, 32, 32)
        points = {(x + 16, y + 16): "colour"}
        if scene[quarter]["texture"] == "plain":
            points |= {(x, y): "card", (x + 31, y + 31): "card"}
        for point, name in points.items():
            assert row.image.getpixel(point) == ImageColor.getrgb(scene[quarter][name])
        right, *wrong = row.texts
        assert row.difficulty == names[level]
        assert right == data.describe_object(scene[quarter]) not in wrong
        if row.difficulty == "pointing":
            assert sorted(row.texts) == sorted(data.describe_object(obj) for obj in scene)
            continue
        assert len(set(wrong)) == len(wrong) == 10
        for text in wrong:
            words = zip(right.split(), text.split(), strict=True)
            num_changes = sum(ours != theirs for ours, theirs in words)
            assert num_changes == level + 1 or row.difficulty == "trivial"


@pytest.mark.parametrize("limits", [(5, 0), (0, 2), (2, 0), (2, 2), (9, 9)])
def test_queries_are_a_caption_its_drawn_sentences_and_their_phrases(limits):
    phrases = [[[f"noun {i}", "image"], [f"verb {i}"], ["here"]] for i in range(7)]
    rng = random.Random(0)
    (caption, level), *others = data.make_queries(list("0123456"), phrases, limits, rng)
    drawn = caption.split(". ")
    assert level == "caption"
    assert set(drawn) <= set("0123456")
    assert len(set(drawn)) == len(drawn) == min(7, limits[0] or 5)  # a caption needs some
    assert (drawn == sorted(drawn)) == (limits[0] == 9)  # all are in order, some are not
    expected = [(sentence, "sentence") for sentence in drawn if limits[0]]
    merged = [f"noun {i}" for i in drawn] + [f"verb {i}" for i in drawn] + ["here"]
    expected += [(phrase, "phrase") for phrase in merged[:limits[1]]]
    assert others == expected


def test_a_batch_says_whose_each_query_is_and_cuts_long_ones_before_eos(tokenizer):
    first = [("a red circle", "caption"), ("red " * 40, "phrase")]
    second = [("blue " * 400, "caption"), ("a square", "sentence"), ("a red circle", "phrase")]
    samples = [(torch.zeros(3, 8, 8), first, ["a"]), (torch.zeros(3, 8, 8), second, ["b"])]
    batch = data.collate(samples, tokenizer)
    assert batch.pixels.shape == (2, 3, 8, 8)
    assert batch.read_errors == ["a", "b"]
    assert batch.image_of_query.tolist() == [0, 0, 1, 1, 1]
    assert batch.caption_index.tolist() == [0, 2]
    assert [data.LEVELS[i] for i in batch.level] == [level for _, level in first + second]
    distinct = batch.texts.tokens.split(batch.texts.offsets.diff().tolist())
    assert len(distinct) == 4
    expected = ["a red circle", "red " * 28, "blue " * 246, "a square", "a red circle"]
    for index, text in zip(batch.texts.distinct, expected, strict=True):
        assert distinct[index].tolist() == tokenizer(text).input_ids


def draw(size, batch_size, world_size, start=0, stop=300, seed=5):
    """The samples of all ranks, as lists of (epoch, index) for each global batch."""
    ranks = [data.sample_order(size, batch_size, start, stop, rank, world_size, seed)
             for rank in range(world_size)]
    return [sum(batches, []) for batches in zip(*ranks, strict=True)]


@pytest.mark.parametrize("size, batch_size, world_size", [
    (50, 4, 3), (50, 12, 1), (100, 64, 1), (100, 32, 2), (37, 5, 2), (13, 4, 3), (12, 4, 3)])
def test_an_epoch_has_each_sample_once_and_a_global_batch_none_twice(size, batch_size, world_size):
    together = batch_size * world_size
    stop = 6 * size // together * together
    batches = draw(size, batch_size, world_size, 0, stop)
    for batch in batches:
        assert len({index for _, index in batch}) == len(batch) == together
    orders = defaultdict(list)
    for epoch, index in sum(batches, []):
        orders[epoch].append(index)
    assert orders[0] != orders[1]
    for epoch in range(5):
        assert sorted(orders[epoch]) == list(range(size)) != orders[epoch]
    for step in range(len(batches)):
        assert draw(size, batch_size, world_size, step * together, stop) == batches[step:]
    assert draw(size, together, 1, together, stop) == batches[1:]  # on one process


def test_a_run_may_be_resumed_with_another_global_batch():
    drawn = sum(draw(50, 4, 3), [])
    assert sum(draw(50, 6, 1, start=120), []) == drawn[120:]


@pytest.mark.parametrize("size", [(90, 70), (64, 64), (40, 100)])
def test_pixels_for_evaluation_are_torchvisions_and_the_stock_processors(tmp_path, size):
    image = Image.open(make_image(tmp_path / "a.png", size))
    resized = transforms.Resize(64, transforms.InterpolationMode.BICUBIC)(image)
    centre = transforms.PILToTensor()(transforms.CenterCrop(64)(resized))
    assert data.to_pixels(image, 64).equal(centre)
    stock = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64},
                               do_rescale=False, do_normalize=False)
    theirs = torch.as_tensor(stock(image).pixel_values[0])
    torch.testing.assert_close(data.to_pixels(image, 64).float(), theirs.float(), atol=1, rtol=0)
    stretched = transforms.PILToTensor()(image.resize((64, 64)))
    assert data.to_pixels(image, 64, stretch=True).equal(stretched)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name, decoded, most", [("a.png", 600, 0), ("a.jpg", 300, .5)])
def test_images_are_upright_and_crops_are_torchvisions(tmp_path, name, decoded, most, orientation):
    upright = Image.open(make_image(tmp_path / name, (600, 400)))
    turned = upright.transpose(TURNS[orientation]) if orientation > 1 else upright.copy()
    exif = Image.Exif()
    exif[0x112] = orientation
    turned.save(tmp_path / f"turned {name}", exif=exif, quality=95)
    for stretch in (False, True):
        pixels = data.to_pixels(Image.open(tmp_path / f"turned {name}"), 64, stretch)
        difference = pixels.float() - data.to_pixels(upright, 64, stretch)
        assert difference.abs().mean() <= most
    for seed in range(3):
        with Image.open(tmp_path / name) as image:
            pixels = data.random_crop(image, 64, random.Random(seed))
            torch.manual_seed(random.Random(seed).getrandbits(63))
            crop = transforms.RandomResizedCrop(64, (0.5, 1))(image)
        assert pixels.equal(transforms.PILToTensor()(crop))
        with Image.open(tmp_path / f"turned {name}") as image:
            difference = pixels.float() - data.random_crop(image, 64, random.Random(seed))
        assert difference.abs().mean() <= most
        assert max(image.size) == decoded  # JPEG: at a half
