"""Every command explains itself at once, refuses what it does not know, and is completed by shells."""

import importlib
import subprocess
import sys

import pytest

from img2vid.cli import COMMANDS
from img2vid.cli import main as cli
from tests.test_architecture import loaded_of


def leaves(commands=COMMANDS, before=()):
    for word, (module, _) in commands.items():
        if isinstance(module, dict):
            yield from leaves(module, (*before, word))
        else:
            yield (*before, word), module


ALL = dict(leaves())


def test_help_needs_nothing_heavy():
    """What takes seconds to import is imported when the arguments are understood."""
    made = "; ".join(f"importlib.import_module({module!r}).make_parser().format_help()" for module in ALL.values())
    heavy = {"torch", "timm", "open_clip", "lightning", "av", "matplotlib", "sklearn", "transformers"}
    assert loaded_of(heavy, f"import importlib; {made}") == set()


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_help_says_what_the_command_is_called_and_does(words, capsys):
    with pytest.raises(SystemExit) as left:
        cli([*words, "--help"])
    printed = capsys.readouterr().out
    assert left.value.code == 0
    assert f"img2vid {' '.join(words)}" in printed
    parser = importlib.import_module(ALL[words]).make_parser()
    for action in parser._actions:
        assert action.help or action.choices, f"{words} {action.option_strings or action.dest} has no help"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trian"], "error: There is no command img2vid trian. Did you mean 'train'"),
        (["eval", "zeroshot"], "error: There is no command img2vid eval zeroshot. Did you mean 'zero-shot'"),
        (["eval"], "find videos by captions"),
        ([], "turn an image transformer into a video transformer"),
    ],
    ids=["command", "part of a command", "half of a command", "nothing"],
)
def test_a_word_that_is_wrong_or_missing_is_answered_with_the_right_ones(words, told, capsys):
    assert cli(words) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("command", [["convert"], ["eval", "zero-shot", "--model=m", "--data=d.csv"]], ids=" ".join)
@pytest.mark.parametrize(
    "wrong", [["--num-frame", "4"], ["--num-frame=4"], ["stray", "--num-frame", "4"]], ids=" ".join
)
def test_an_option_that_does_not_exist_is_answered_with_the_nearest(command, wrong, capsys):
    with pytest.raises(SystemExit) as left:
        cli([*command, *wrong])
    assert left.value.code == 2
    assert "Did you mean '--num-frames'" in capsys.readouterr().err


def test_completion_knows_commands_and_options(tmp_path, capsys):
    assert cli(["completion", "bash"]) == 0
    script = tmp_path / "img2vid.bash"
    script.write_text(capsys.readouterr().out)
    ask = """source {0}
COMP_WORDS=({1}); COMP_CWORD={2}; COMP_LINE="${{COMP_WORDS[*]}}"
_shtab_img2vid "" "${{COMP_WORDS[COMP_CWORD]}}"; echo "${{COMPREPLY[@]}}"
"""

    def completed(*words):
        code = ask.format(script, " ".join(words), len(words) - 1)
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return set(done.stdout.split())

    assert {"convert", "certify"} <= completed("img2vid", "c")
    assert completed("img2vid", "eval", "h") == {"honesty"}
    assert "--num-frames" in completed("img2vid", "eval", "zero-shot", "--num")
    assert "--prefix-mode" in completed("img2vid", "convert", "--pre")
    assert str(script) in completed("img2vid", "convert", "--weights", str(script)[:-3])


def test_the_commands_run_as_modules():
    done = subprocess.run([sys.executable, "-m", "img2vid.demo", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "img2vid demo" in done.stdout


@pytest.mark.parametrize(
    ("missing", "statement", "extra"),
    [
        ("lightning", "import img2vid.training", "train"),
        ("sklearn", "from img2vid.data.digits import load_digits; load_digits('test')", "eval"),
    ],
)
def test_what_is_not_installed_is_named_with_its_extra(missing, statement, extra):
    code = f"import sys; sys.modules[{missing!r}] = None; {statement}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"pip install 'img2vid[{extra}]'" in done.stderr.strip().splitlines()[-1]
