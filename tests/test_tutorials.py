"""A newcomer who copies every line of a tutorial into a shell gets what the page says, here at a smaller size."""

import re
import shlex

import pytest
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from img2vid.backbones.reading import ATTENTIONS, BLOCKS
from img2vid.data.module import VideoData
from img2vid.training import VideoTraining
from img2vid.training.fit import TrainingCLI
from tests.documents import ROOT, Block, blocks, dead_links, logs_to_stderr, missing, run_page

FOLDER = ROOT / "docs" / "tutorials"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PAGES = sorted(FOLDER.glob("[0-9]_*.md"))
SMALLER = {
    "1_score_my_videos": {"--test 160": "--test 16"},
    "2_finetune_a_folder": {"--train 400 --val 80 --test 80": "--train 56 --val 80 --test 8"},
    "3_many_gpus": {"--train 64": "--train 32", "--shard-videos 16": "--shard-videos 8"},
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder with what a clone of the repository has; what a page makes known is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")  # so wide were the terminals that the pages show
    for name in ("configs", "train"):
        (tmp_path / name).symlink_to(ROOT / name)
    known = dict(BLOCKS), dict(ATTENTIONS)
    yield tmp_path
    for table, rows in zip((BLOCKS, ATTENTIONS), known, strict=True):
        table.clear()
        table.update(rows)


def start_processes(block: Block) -> bool:
    return any(line.startswith("torchrun ") for line in block.commands)


def first_process(page: str) -> int:
    """The line of a page from which on it needs several processes."""
    return next((b.line for b in blocks(page, "bash") if start_processes(b)), len(page))


def run(path, capsys, only) -> None:
    with logs_to_stderr():
        run_page(path, lambda: "\n".join(capsys.readouterr()), SMALLER.get(path.stem), only)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_pages_run_from_top_to_bottom(path, place, capsys):
    end = first_process(path.read_text())
    run(path, capsys, lambda block: block.line < end)


@pytest.mark.multiprocess
def test_what_needs_several_processes_runs_too(place, capsys):
    run(FOLDER / "3_many_gpus.md", capsys, lambda block: True)


def test_the_objective_of_contributing_runs(place, capsys):
    run(CONTRIBUTING, capsys, lambda block: True)


def test_a_reader_of_several_pages_never_finds_a_folder_taken():
    """`data synth` refuses a folder that is not empty, and pages are read one after the other in one clone."""
    shells = [block for path in [ROOT / "README.md", *PAGES] for block in blocks(path.read_text(), "bash")]
    lines = [line for block in shells for line in block.commands if line.startswith("img2vid data synth ")]
    folders = [shlex.split(line)[3] for line in lines]
    assert len(folders) >= 5
    assert sorted(set(folders)) == sorted(folders)


@pytest.mark.parametrize("path", [*PAGES, FOLDER / "README.md", CONTRIBUTING], ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    assert dead_links(path) == []


def test_the_index_names_every_page():
    index = (FOLDER / "README.md").read_text()
    assert [path.name for path in PAGES] == sorted(set(re.findall(r"\]\((\d_\w+\.md)\)", index)))


# ---- commands for machines that tests do not have


def training_options(command: str) -> list[str] | None:
    """The options of a training command; None for other commands."""
    words = shlex.split(command)
    if "train/fit.py" in words:
        return words[words.index("train/fit.py") + 2 :]
    return words[2:] if words[:2] == ["img2vid", "train"] else None


OPTIONS = [
    options
    for path in PAGES
    for block in blocks(path.read_text(), "sh")
    for command in block.commands
    if (options := training_options(command)) is not None
]
YAML = [block.text for path in PAGES for block in blocks(path.read_text(), "yaml")]


class ParseOnly(TrainingCLI):
    """Everything is read and checked, nothing is built."""

    def instantiate_classes(self) -> None:
        pass

    before_instantiate_classes = after_instantiate_classes = instantiate_classes


def parse(*options: str) -> LightningArgumentParser:
    return ParseOnly(VideoTraining, VideoData, args=list(options), run=False).parser


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_commands_that_are_only_shown_have_options_that_exist(options, place):
    parse(*options)
    with pytest.raises(SystemExit):
        parse(*options, "--trainer.gpus=8")


@pytest.mark.parametrize("text", YAML)
def test_yaml_that_is_only_shown_has_keys_that_exist(text, place):
    (place / "shown.yaml").write_text(text)
    parse("--config=configs/train/smoke.yaml", "--config=shown.yaml")
    top = next(iter(yaml.safe_load(text)))
    (place / "wrong.yaml").write_text(f"{text.rstrip()}\n  no_such_key: 1\n")
    assert top in ("data", "trainer")
    with pytest.raises(SystemExit):
        parse("--config=configs/train/smoke.yaml", "--config=wrong.yaml")


# ---- the instrument itself


def test_missing_finds_words_that_were_not_printed_and_forgives_numbers():
    printed = "┏━━━┓\n┃ top-1 ┃ 95.0 [91.9, 98.1] ┃\nwrote runs/a.json\n   3.1 s  done\n"
    assert missing("top-1 94.2 [1, 2]\n  ...\n 12.0 s  done\n", printed) is None
    assert missing("top-5 94.2\n", printed) == "top-5 94.2\n"
    assert "wrote" in missing("done\n ...\nwrote runs/a.json\n", printed)  # another order


def test_pages_that_print_something_else_fail(place, capsys):
    page = place / "page.md"
    page.write_text("```python\nprint('seven 0.9')\n```\n```text\nseven 0.8\n```\n")
    run(page, capsys, lambda block: True)
    page.write_text(page.read_text().replace("seven 0.8", "eight 0.8"))
    with pytest.raises(AssertionError, match=r"page.md, line 4: not printed"):
        run(page, capsys, lambda block: True)
