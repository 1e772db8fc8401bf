"""The promises of README.md: its size, commands, flags, files, and its Python."""

import re
import shutil

import pytest
from conftest import ROOT, make_image

import eval as evaluation
import train

README = (ROOT / "README.md").read_text(encoding="utf-8")
FLAG = re.compile(r"(?<!\S)`?(--[a-z][\w-]*)")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_sizes():
    lines = README.splitlines()
    assert len(lines) <= 200
    for line in lines:
        assert len(re.sub(r"\(http\S*\)", "", line)) <= 100, line
    num_lines = 0
    for path in (*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert all(len(line) <= 100 for line in lines), path
        num_lines += len(lines) if path.parent == ROOT else 0
    assert sorted(path.name for path in ROOT.glob("*.py")) == sorted(train.CODE_FILES)
    assert num_lines <= 2200


def test_commands_and_flags_exist(capsys):
    flags_of = {"torchrun": {"--nproc_per_node"}}
    for program in (train, evaluation):
        with pytest.raises(SystemExit):
            program.main(["--help"])
        flags_of[f"{program.__name__}.py"] = set(FLAG.findall(capsys.readouterr().out))
    assert set(FLAG.findall(README)) <= set().union(*flags_of.values())
    commands = "\n".join(block for kind, block in BLOCKS if kind == "bash")
    pieces = re.split(r"\b(torchrun|train\.py|eval\.py)\b", commands.replace("#", "\n"))
    for program, rest in zip(pieces[1::2], pieces[2::2], strict=True):
        assert set(FLAG.findall(rest.split("\n")[0])) <= flags_of[program], rest


def test_files_and_lines_that_are_named_exist():
    for name in re.findall(r"(?:tests|\.github)/[\w./]+\w", README):
        assert (ROOT / name).exists(), name
    code = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("*.py"))
    for line in "".join(block for kind, block in BLOCKS if kind == "diff").splitlines():
        if not line.startswith("+") and line.strip() != "...":
            assert f"{line[1:]}\n" in code, line


def test_python_blocks_run(tmp_path, monkeypatch, clip_folder):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(clip_folder, "runs/scenes-ce-beta0.5-seed0/hf")
    for name in "ab":
        make_image(tmp_path / f"{name}.jpg")
    for block in [block for kind, block in BLOCKS if kind == "python"]:
        exec(block.replace("openai/clip-vit-base-patch16", str(clip_folder)), {})
