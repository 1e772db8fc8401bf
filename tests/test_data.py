"""Scenes, the pixels of an image, and the way of a sample from its index to a batch."""

import itertools
import random
from collections import defaultdict

import numpy as np
import pytest
import torch
from conftest import make_image
from PIL import Image, ImageColor
from PIL.Image import Transpose
from torchvision import transforms
from transformers import CLIPImageProcessor

import data
import eval as evaluation


def test_splits_share_no_scene_and_members_of_a_group_differ_in_one_attribute():
    captions = {}
    for split, count in data.NUM_SCENES.items():
        scenes = [data.make_scene(split, index) for index in range(count)]
        captions[split] = {". ".join(data.describe_scene(scene)[0]) for scene in scenes}
    held_out = captions["val"] | captions["test"]
    assert len(held_out) == data.NUM_SCENES["val"] + data.NUM_SCENES["test"]
    assert not captions["train"] & held_out
    for first in range(0, 80, data.GROUP_SIZE):
        group = scenes[first:first + data.GROUP_SIZE]
        for other in group[1:]:
            changes = [name for before, after in zip(group[0], other, strict=True)
                       for name in data.ATTRIBUTES if before[name] != after[name]]
            assert len(changes) == 1
        assert len({data.draw_scene(scene).tobytes() for scene in group}) == data.GROUP_SIZE


def test_scenes_have_four_sentences_and_phrases_and_the_tokenizer_knows_each_word(tokenizer):
    samples = data.Scenes(data.PICTURE_PIXELS, (5, 8))
    for index in range(100):
        texts, levels = zip(*samples[0, index][1], strict=True)
        phrases = {data.describe_object(obj) for obj in data.make_scene("train", index)}
        assert levels == ("caption", *["sentence"] * 4, *["phrase"] * len(phrases))
        assert set(texts[5:]) == phrases
        for text, ids in zip(texts, data.tokenize(tokenizer, texts), strict=True):
            assert len(ids) - 2 == len(text.replace(".", " .").split())


def test_boxes_are_the_cards_and_wrong_descriptions_differ_as_their_difficulty_says():
    rows = [row for row in evaluation.read_scenes(None) if row.box]
    originals = range(0, data.NUM_SCENES["test"], data.GROUP_SIZE)
    keys = itertools.product(originals, range(4), enumerate([*evaluation.FGOVD_FILES, "pointing"]))
    for row, (original, quarter, (level, name)) in zip(rows, keys, strict=True):
        scene = data.make_scene("test", original)
        x, y = 32 * (quarter % 2), 32 * (quarter // 2)
        assert row.box == (x, y, 32, 32)
        assert row.image.getpixel((x + 16, y + 16)) == ImageColor.getrgb(scene[quarter]["colour"])
        right, *wrong = row.texts
        assert row.difficulty == name
        assert right == data.describe_object(scene[quarter])
        if row.difficulty == "pointing":
            assert sorted(row.texts) == sorted(data.describe_object(obj) for obj in scene)
            continue
        assert len({right, *wrong}) == len(row.texts) == 11
        for text in wrong:
            words = zip(right.split(), text.split(), strict=True)
            num_changes = sum(ours != theirs for ours, theirs in words)
            assert num_changes == level + 1 or row.difficulty == "trivial"


@pytest.mark.parametrize("limits", [(5, 0), (0, 2), (2, 2), (7, 0), (9, 9)])
def test_queries_are_a_caption_its_drawn_sentences_and_their_phrases(limits):
    phrases = [[[f"noun {i}", "image"], [f"verb {i}"], ["here"]] for i in range(7)]
    (caption, level), *others = data.make_queries([*"0123456"], phrases, limits, random.Random(0))
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
    assert batch.read_errors == ["a", "b"]
    assert batch.image_of_query.tolist() == [0, 0, 1, 1, 1]
    assert batch.caption_index.tolist() == [0, 2]
    assert [data.LEVELS[i] for i in batch.level] == [level for _, level in first + second]
    distinct = batch.texts.tokens.split(batch.texts.offsets.diff().tolist())
    assert len(distinct) == 4
    expected = ["a red circle", "red " * 28, "blue " * 246, "a square", "a red circle"]
    for index, text in zip(batch.texts.inverse, expected, strict=True):
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


@pytest.mark.parametrize("orientation, turn", [*enumerate([  # as a camera that is held so stores it
    Transpose.FLIP_LEFT_RIGHT, Transpose.ROTATE_180, Transpose.FLIP_TOP_BOTTOM, Transpose.TRANSPOSE,
    Transpose.ROTATE_90, Transpose.TRANSVERSE, Transpose.ROTATE_270], start=2)])
@pytest.mark.parametrize("name, decoded, most", [("a.png", 600, 0), ("a.jpg", 300, .5)])
def test_pixels_are_upright_and_stock(tmp_path, name, decoded, most, orientation, turn):
    upright = Image.open(make_image(tmp_path / name, (600, 400)))
    stock = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64},
                               do_rescale=False, do_normalize=False)
    theirs = torch.as_tensor(stock(upright).pixel_values[0])
    torch.testing.assert_close(data.to_pixels(upright, 64).float(), theirs.float(), atol=1, rtol=0)
    exif = Image.Exif()
    exif[0x112] = orientation
    upright.transpose(turn).save(tmp_path / f"turned {name}", exif=exif, quality=95)
    pixels = data.to_pixels(data.open_image(f"turned {name}", tmp_path), 64).float()
    assert (pixels - data.to_pixels(upright, 64)).abs().mean() <= most
    for seed in range(3):
        images = [data.open_image(path, tmp_path, 128) for path in (name, f"turned {name}")]
        crops = [data.random_crop(image, 64, random.Random(seed)) for image in images]
        torch.manual_seed(random.Random(seed).getrandbits(63))
        crop = transforms.RandomResizedCrop(64, (0.5, 1))(images[0])
        assert crops[0].equal(transforms.PILToTensor()(crop))
        assert (crops[1].float() - crops[0]).abs().mean() <= most
        assert max(images[1].size) == decoded  # JPEG: at a half


def test_sixteen_bits_are_scaled(tmp_path):
    red = np.asarray(Image.open(make_image(tmp_path / "a.png")).getchannel("R"))
    grey = data.to_rgb(Image.fromarray(red * np.uint16(257)))
    assert np.array_equal(grey, np.stack([red] * 3, axis=2))
