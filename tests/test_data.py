"""The built-in scenes, and the way of a sample from its index to a batch."""

import random
import subprocess
import sys
from pathlib import Path

import torch

import data


def test_scenes_follow_from_split_and_index():
    assert data.scene("train", 7) == data.scene("train", 7) != data.scene("train", 8)
    assert data.draw(data.scene("test", 7)).tobytes() == data.draw(data.scene("test", 7)).tobytes()


def test_train_and_test_are_disjoint():
    captions = {split: {". ".join(data.describe(data.scene(split, i))[0]) for i in range(size)} for split, size in data.SPLITS.items()}
    assert not captions["train"] & captions["test"]
    assert len(captions["test"]) == data.SPLITS["test"]


def test_siblings_differ_in_one_attribute_of_one_object():
    for index in range(0, 40, data.SIBLINGS):
        original = data.scene("test", index)
        for member in range(1, data.SIBLINGS):
            sibling = data.scene("test", index + member)
            different = [(place, name) for place in range(4) for name in (*data.ATTRIBUTES, "shape")
                         if original["objects"][place][name] != sibling["objects"][place][name]]
            assert len(different) == 1 and sibling["background"] == original["background"]
            assert data.draw(sibling).tobytes() != data.draw(original).tobytes()


def test_captions_need_the_long_context(tokenizer):
    for index in range(50):
        sentences, phrases = data.describe(data.scene("train", index))
        drawn = data.draw_sentences(len(sentences), 5, random.Random(index))
        (caption, *_), _ = data.queries([sentences[i] for i in drawn], phrases, Want(5, 8))
        assert 77 < len(data.tokenize(tokenizer, [caption], [999])[0]) <= data.CONTEXT


def test_the_tokenizer_is_always_the_same(tokenizer):
    code = "import data; print(sorted(data.scenes_tokenizer().get_vocab().items()))"
    other = subprocess.run([sys.executable, "-c", code], cwd=Path(data.__file__).parent, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str(sorted(tokenizer.get_vocab().items()))


def test_each_word_is_one_token_and_anything_else_is_bytes(tokenizer):
    for index in range(100):
        for text in sum(data.describe(data.scene("test", index)), []):
            assert len(tokenizer(text)["input_ids"]) == len(text.split()) + 2
    assert tokenizer.decode(tokenizer("a zebra, 雪!")["input_ids"], skip_special_tokens=True).replace(" ", "") == "azebra,雪!"


def test_boxes_are_the_objects_cards():
    for index in range(20):
        one = data.scene("train", index)
        image = data.draw(one)
        for thing in one["objects"]:
            x, y, w, h = thing["box"]
            assert 0 <= x and 0 <= y and x + w <= data.SIZE and y + h <= data.SIZE
            assert image.getpixel((x + w // 2, y + h // 2)) == data.COLOURS[thing["colour"]]
            if thing["texture"] == "plain":
                assert {image.getpixel(at) for at in [(x, y), (x + w - 1, y + h - 1)]} == {data.COLOURS[thing["card"]]}
            if x % 32:  # room on the left, in the same cell
                assert image.getpixel((x - 1, y)) == data.BACKGROUNDS[one["background"]]


def test_box_expressions_differ_in_as_many_attributes_as_their_level_says():
    for row in data.scene_boxes():
        for level, split in enumerate(("hard", "medium", "easy"), start=1):
            positive, *negatives = row[split]
            assert len(set(negatives)) == 10 and positive not in negatives
            assert all(len(positive.split()) == len(negative.split()) for negative in negatives)
            differing = [sum(a != b for a, b in zip(positive.split(), negative.split())) for negative in negatives]
            assert differing == [level] * 10
        assert len(set(row["trivial"])) == 11 and row["trivial"][0] == row["hard"][0]


class Want:
    captions_only = False

    def __init__(self, sentences, phrases):
        self.sentences, self.phrases = sentences, phrases


def test_queries_of_a_draw():
    drawn = data.draw_sentences(6, 5, random.Random(0))
    assert len(set(drawn)) == 5 and list(drawn) != sorted(drawn)
    assert list(data.draw_sentences(3, 5, random.Random(0))) == [0, 1, 2]  # fewer: all, in order
    assert len(data.draw_sentences(6, 0, random.Random(0))) == 5           # no sentence is a query, the caption still has five
    sentences, phrases = ["s2", "s1"], ["p1", "p2", "p3"]
    assert data.queries(sentences, phrases, Want(5, 2)) == (["s2. s1", "s2", "s1"], ["p1", "p2"])
    assert data.queries(sentences, phrases, Want(0, 9)) == (["s2. s1"], ["p1", "p2", "p3"])


def test_a_long_text_is_cut_so_that_eos_stays(tokenizer):
    long, short = data.tokenize(tokenizer, ["red " * 1000, "red " * 1000], [data.CONTEXT, data.PHRASE_TOKENS])
    assert len(long) == data.CONTEXT and long[-1] == tokenizer.eos_token_id
    assert len(short) == 30 and short[-1] == tokenizer.eos_token_id


def test_collate_is_undone_by_split(tokenizer):
    samples = [(torch.zeros(3, 8, 8), ["a red star"], ["red " * 40], []), (torch.ones(3, 8, 8), ["a large blue cross"], [], ["x.jpg: broken"])]
    pixels, tokens, lengths, owner, unreadable = data.collate(samples, tokenizer)
    texts = tokens.split(lengths.tolist())
    assert [tokenizer.decode(text, skip_special_tokens=True) for text in texts] == ["a red star", "red " * 27 + "red", "a large blue cross"]
    assert owner.tolist() == [0, 0, 1] and pixels.shape == (2, 3, 8, 8) and unreadable == ["x.jpg: broken"]


def test_each_sample_is_drawn_once_an_epoch_across_ranks():
    size, batch, world = 50, 4, 3  # 50 is no multiple of 12: batches straddle the epochs
    ranks = [list(data.Batches(size, batch, 0, 300, rank, world, seed=5)) for rank in range(world)]
    drawn = [sample for step in zip(*ranks) for part in step for sample in part]
    assert len(drawn) == 300
    for epoch in range(6):
        assert sorted(index for e, index in drawn if e == epoch) == list(range(size))
    assert [i for e, i in drawn if e == 0] != [i for e, i in drawn if e == 1]
    assert list(data.Batches(size, batch, 120, 300, 1, world, seed=5)) == ranks[1][10:]  # a step's samples follow from where it starts
