"""The built-in scenes, the pixels of an image, and the way of a sample from its index to a batch."""

import random
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, picture
from PIL import Image
from torchvision import transforms
from transformers import CLIPImageProcessor

import data
import model as models

def test_no_two_splits_share_a_scene_and_siblings_differ_in_one_attribute():
    assert data.scene("train", 7) == data.scene("train", 7) != data.scene("train", 8)
    captions = {split: {". ".join(data.describe(data.scene(split, index))[0]) for index in range(count)}
                for split, count in data.SPLITS.items()}
    assert len(captions["val"]) == data.SPLITS["val"] and len(captions["test"]) == data.SPLITS["test"]
    assert len(set().union(*captions.values())) == sum(map(len, captions.values()))
    for index in range(0, 40, data.SIBLINGS):
        group = [data.scene("test", index + member) for member in range(data.SIBLINGS)]
        for sibling in group[1:]:
            objects = zip(group[0]["objects"], sibling["objects"])
            different = [name for ours, theirs in objects for name in ours if ours[name] != theirs[name]]
            assert len(different) == 1 and {*different} <= {*data.ATTRIBUTES}  # no shape, no box
            assert sibling["background"] == group[0]["background"]
        assert len({data.paint(scene).tobytes() for scene in group}) == data.SIBLINGS

def test_the_tokenizer_is_always_the_same_with_one_token_a_word_and_long_captions(tokenizer):
    code = "import data; print(data.scenes_tokenizer().get_vocab() == {})".format(tokenizer.get_vocab())
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "True\n"
    samples = data.Scenes(data.SIZE)
    for index in range(100):
        texts = [text for text, _ in samples[0, index][1]] + data.describe(data.scene("test", index))[0]
        ids = data.tokenize(tokenizer, texts, [999] * len(texts))
        assert [len(one) - 2 for one in ids] == [len(text.replace(".", " .").split()) for text in texts]
        assert 77 < len(ids[0]) <= 248
    ids = data.tokenize(tokenizer, ["a zebra, 雪!"])[0]  # all else is bytes
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "azebra,雪!"

def test_boxes_are_the_cards_and_their_expressions_differ_as_their_level_says():
    for number, row in enumerate(data.scene_boxes("test")):
        scene, place = data.scene("test", row["image"] * data.SIBLINGS), number % 4
        thing, image, (x, y, w, h) = scene["objects"][place], data.paint(scene), row["box"]
        assert (x // 32, y // 32) == ((x + w - 1) // 32, (y + h - 1) // 32) == (place % 2, place // 2)
        assert image.getpixel((x + w // 2, y + h // 2)) == data.COLOURS[thing["colour"]]
        for corner in ((x, y), (x + w - 1, y + h - 1)) if thing["texture"] == "plain" else ():
            assert image.getpixel(corner) == data.COLOURS[thing["card"]]
        for level, name in enumerate(("hard", "medium", "easy"), start=1):
            positive, *negatives = (text.split() for text in row[name])
            assert positive == data.expression(thing).split() and len(set(row[name])) == 11
            assert [sum(map(str.__ne__, positive, negative)) for negative in negatives] == [level] * 10
        assert len(set(row["trivial"])) == 11 and row["trivial"][0] == row["hard"][0]

def test_queries_of_a_draw():
    draw = lambda count, wanted: list(data.draw_sentences(count, wanted, random.Random(0)))
    assert len({*draw(6, 5)}) == 5 and {*draw(6, 5)} < {*range(6)} and draw(6, 5) != sorted(draw(6, 5))
    assert draw(5, 5) == [0, 1, 2, 3, 4] and len(draw(9, 0)) == 5  # all, in order; a caption needs some
    rest = [("s2", "sentence"), ("s1", "sentence"), ("p1", "phrase"), ("p2", "phrase")]
    for settings, part in [((0, 2), rest[2:]), ((2, 0), rest[:2]), ((2, 2), rest)]:
        queries = data.make_queries(["s2", "s1"], ["p1", "p2", "p3"], settings)
        assert queries == [("s2. s1", "caption"), *part]

def test_a_batch_says_whose_each_query_is_and_cuts_long_ones_before_eos(tokenizer):
    queries = [[("a red star", "caption"), ("red " * 40, "phrase")],
               [("blue " * 400, "caption"), ("a cross", "sentence"), ("a red star", "phrase")]]
    samples = [(torch.zeros(3, 8, 8), part, [f"{len(part)}.jpg"]) for part in queries]
    batch = data.collate(samples, tokenizer, models.pack)
    assert batch.pixels.shape == (2, 3, 8, 8) and batch.unreadable == ["2.jpg", "3.jpg"]
    assert batch.owner.tolist() == [0, 0, 1, 1, 1] and batch.captions.tolist() == [0, 2]
    captions = data.collate(samples, tokenizer, models.pack, captions_only=True)
    assert captions.owner.tolist() == captions.captions.tolist() == [0, 1] and len(captions.texts.rows) == 2
    assert [data.LEVELS[level] for level in batch.level] == [level for part in queries for _, level in part]
    distinct = batch.texts.tokens.split(batch.texts.offsets.diff().tolist())
    texts = [distinct[row].tolist() for row in batch.texts.rows]
    expected = ["a red star", "red " * 28, "blue " * 246, "a cross", "a red star"]  # 30, 248 with EOS
    assert len(distinct) == 4 and texts == [tokenizer(text).input_ids for text in expected]

def test_each_sample_is_drawn_once_an_epoch_across_ranks_and_from_anywhere_on():
    size, batch, world = 50, 4, 3  # 50 is no multiple of 12: batches straddle the epochs
    ranks = [list(data.batches(size, batch, 0, 300, rank, world, seed=5)) for rank in range(world)]
    drawn = [sample for step in zip(*ranks) for part in step for sample in part]
    epochs = [[index for epoch, index in drawn if epoch == number] for number in range(6)]
    assert len(drawn) == 300 and epochs[0] != epochs[1]
    assert all(sorted(epoch) == list(range(size)) != epoch for epoch in epochs)
    assert list(data.batches(size, batch, 120, 300, 1, world, seed=5)) == ranks[1][10:]  # as a resumed run
    assert sum(data.batches(size, 6, 120, 300, 0, 1, seed=5), []) == drawn[120:]  # on one process

@pytest.mark.parametrize("size", [(90, 70), (64, 64), (40, 100)])
def test_pixels_of_a_test_are_torchvisions_and_the_stock_processors(tmp_path, size):
    image = Image.open(picture(tmp_path / "a.png", size))
    middle = transforms.CenterCrop(64)(transforms.Resize(64, transforms.InterpolationMode.BICUBIC)(image))
    stock = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    theirs = transforms.Normalize(stock.image_mean, stock.image_std)(transforms.ToTensor()(middle))
    ours = data.normalize(data.to_pixels(image, 64))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours, stock(image).pixel_values[0], atol=.016, rtol=0)  # a level is .015
    assert data.to_pixels(image, 64, whole=True).equal(transforms.PILToTensor()(image.resize((64, 64))))

@pytest.mark.parametrize("name, most", [("a.png", .06), ("a.jpg", .5)])
def test_training_crops_are_torchvisions(tmp_path, name, most):
    image = Image.open(picture(tmp_path / name, (1200, 800)))
    for seed in range(5):
        torch.manual_seed(random.Random(seed).getrandbits(63))
        theirs = transforms.PILToTensor()(transforms.RandomResizedCrop(64, (0.5, 1))(image))
        with Image.open(tmp_path / name) as opened:
            ours = data.random_crop(opened, 64, random.Random(seed))
        assert opened.size == ((150, 100) if name == "a.jpg" else (1200, 800))  # JPEG: decoded at an eighth
        assert ours.dtype == torch.uint8 and (ours.float() - theirs).abs().mean() < most
