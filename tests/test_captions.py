"""Captions to sentences and phrases, against the authors' numbers."""

import json

import pytest

import data


def test_sentences_golden(golden):
    for case in json.loads((golden / "sentences.json").read_text()):
        assert data.clean(case["caption"]) == case["clean"]
        assert data.split_sentences(case["clean"]) == case["sentences"]


def test_phrases_golden(golden):
    spacy = pytest.importorskip("spacy")
    vocab = spacy.blank("en").vocab
    matchers = data.phrase_matchers(vocab)
    for case in json.loads((golden / "phrases.json").read_text()):
        tokens, sentences = iter(case["tokens"]), []
        for length in case["sentence_lengths"]:  # heads count from the sentence's first token
            part = [next(tokens) for _ in range(length)]
            doc = spacy.tokens.Doc(vocab, words=[t["text"] for t in part], pos=[t["pos"] for t in part],
                                   deps=[t["dep"] for t in part], heads=[t["head"] for t in part])
            sentences.append(data.extract_phrases(doc, matchers))
        assert data.order_phrases(sentences) == case["phrases"]
