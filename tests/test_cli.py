import contextlib
import importlib
import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fsr_fast import cli
from fsr_fast.commands.completion import main as completion
from fsr_fast.errors import UserError

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fsr_fast", *arguments], capture_output=True, text=True, cwd=ROOT)


def test_help_names_every_verb_with_an_example(capsys):
    cli.dispatch(["--help"])
    text = capsys.readouterr().out
    for name, verb in cli.VERBS.items():
        assert f"  {name} " in text
        assert f"$ fsr-fast {name} {verb.example}" in text


def test_no_verb_gives_the_help_and_imports_no_torch():
    script = "import sys; from fsr_fast import cli; cli.dispatch([]); assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "usage: fsr-fast VERB" in result.stdout


def test_an_unknown_verb_is_refused_with_the_nearest_one():
    result = run("trian")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: command line: unknown verb 'trian'; did you mean 'train'?\n"


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_verb_has_help_of_its_own(name, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.dispatch([name, "--help"])
    assert caught.value.code == 0
    assert f"usage: fsr-fast {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", cli.VERBS)
def test_the_example_of_every_verb_is_accepted_by_its_parser(name):
    arguments = cli.VERBS[name].example.split(" > ")[0].split()
    _, unknown = importlib.import_module(cli.VERBS[name].module).build_parser().parse_known_args(arguments)
    assert unknown == []


@pytest.fixture(scope="module")
def scripts() -> dict[str, str]:
    texts = {}
    for shell in ("bash", "zsh", "fish"):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            completion([shell])
        texts[shell] = printed.getvalue()
    return texts


def complete(script: str, *words: str) -> list[str]:
    line = " ".join(f'"{word}"' for word in words)
    command = (
        f'{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _fsr_fast; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    result = subprocess.run(["bash", "--norc", "-c", command], capture_output=True, text=True, check=True)
    return result.stdout.split()


def test_bash_completes_verbs_options_and_choices(scripts):
    assert complete(scripts["bash"], "fsr-fast", "tr") == ["train"]
    assert set(complete(scripts["bash"], "fsr-fast", "")) == set(cli.VERBS)
    assert complete(scripts["bash"], "fsr-fast", "train", "--mask.ra") == ["--mask.ratio", "--mask.random_fraction"]
    assert complete(scripts["bash"], "fsr-fast", "predict", "--device", "c") == ["cpu", "cuda"]
    assert complete(scripts["bash"], "fsr-fast", "predict", "a.jpg", "--mask.ra") == []


def test_zsh_reads_the_script_of_bash_and_fish_has_a_line_for_every_option(scripts):
    assert scripts["zsh"] == "autoload -U +X bashcompinit && bashcompinit\n" + scripts["bash"]
    assert "-n '__fish_seen_subcommand_from predict' -l device -xa 'auto cpu cuda'" in scripts["fish"]
    assert "-n '__fish_seen_subcommand_from train' -l mask.ratio" in scripts["fish"]
    if shutil.which("fish"):
        subprocess.run(["fish", "--no-execute"], input=scripts["fish"], text=True, check=True)


def test_an_unknown_shell_is_refused():
    with pytest.raises(UserError, match="'tcsh'"):
        completion(["tcsh"])
