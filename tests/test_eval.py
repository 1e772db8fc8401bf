"""Metrics against matrices whose answer is plain to see."""

import pytest
import torch

import eval as evaluation


def test_recall_by_hand():
    similarity = torch.tensor([[.9, .1, .0],   # text 0: its image first
                               [.8, .7, .6],   # text 1: its image second
                               [.9, .8, .1]])  # text 2: its image third
    scores = evaluation.recall(similarity, torch.arange(3), ks=(1, 2))
    assert scores["T2I R@1"] == pytest.approx(100 / 3) and scores["T2I R@2"] == pytest.approx(200 / 3)
    # image 0: .9 ties with text 2's .9, which counts against; image 1: .8 is above its .7; image 2: .6 is above its .1
    assert scores["I2T R@1"] == 0 and scores["I2T R@2"] == 100


@pytest.mark.parametrize("score", [0., torch.nan])
def test_recall_when_all_is_equal_is_nil(score):
    assert set(evaluation.recall(torch.full((20, 20), score), torch.arange(20)).values()) == {0}
    assert not evaluation.hits(torch.full((3, 4), torch.nan)).any()


def test_recall_with_several_texts_an_image():
    similarity = torch.tensor([[.2, .1], [.9, .3], [.5, .4], [.1, .8]])  # texts 0, 1 of image 0; 2, 3 of image 1
    scores = evaluation.recall(similarity, torch.tensor([0, 0, 1, 1]), ks=(1,))
    assert scores == {"T2I R@1": 75, "I2T R@1": 100}  # the best of an image's texts counts


def test_a_tie_is_a_hit():
    scores = torch.tensor([[.5, .5, .1], [.5, .6, .1], [.5, .4, -torch.inf]])
    assert evaluation.hits(scores).tolist() == [True, False, True]


def test_box_embeddings_take_the_patches_under_the_box():
    patches = torch.nn.functional.one_hot(torch.arange(16), 16).float()[None]   # 4 x 4 patches, each its own direction
    boxes = torch.tensor([[.25, .5, .25, .25], [0, 0, .5, .5]])                 # patch (2, 1); the four at the top left
    regions = evaluation.box_embeddings(patches, boxes, torch.tensor([0, 0]))
    assert regions[0].argmax() == 9 and regions[0, 9] > .99
    assert regions[1].topk(4).indices.sort().values.tolist() == [0, 1, 4, 5]
