"""A run can be killed, stopped, resumed and moved, and it says when something is wrong."""

import itertools
import json
import os
import resource
import select
import socket
import sys
import time
from functools import partial
from pathlib import Path
from signal import SIGINT, SIGTERM

import datasets
import kill
import pytest
import torch
from conftest import NOTES, make_image, write_file

import data
import eval as evaluation
import train

ENDLESS = "--max-steps 1000 --save-every 1000 --eval-every 1"


@pytest.fixture(autouse=True)
def as_in_the_processes_of_kill(tmp_path, monkeypatch, fast_scenes):
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    monkeypatch.setattr(train, "handle_signals", lambda *_: None)  # pytest keeps its own
    monkeypatch.setattr(evaluation, "evaluate", kill.score_of_weights)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def run(out, flags, main=train.main):
    """Train in this process, or have `run_and_fail` do it."""
    return main(*f"{kill.FLAGS} --workers 0 --out {out} {flags}".split())


def read_checkpoint(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def change_results(monkeypatch, owner, name, calls, change):
    """Apply `change` to the results of some calls, counted from 1, of a function."""
    function = getattr(owner, name)
    count = itertools.count(1)

    def replacement(*args):
        result = function(*args)
        return change(result) if next(count) in calls else result

    monkeypatch.setattr(owner, name, replacement)
