import ast
import contextlib
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fsr_fast import cli
from fsr_fast.commands.completion import main as completion
from fsr_fast.commands.parsers import TRAINED_SECTIONS
from fsr_fast.errors import UserError
from fsr_fast.options import Given, given
from fsr_fast.runtime.log import LOGGER

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


@pytest.mark.parametrize(
    "error",
    [UserError("no \x1b[2Jpicture\udce9\n"), FileNotFoundError(2, "No such file", "\x1b[2Jpicture")],
    ids=["ours", "the system's"],
)
def test_names_in_an_error_do_not_steer_the_terminal(error, capsys):
    def fail(arguments):
        raise error

    with pytest.raises(SystemExit):
        cli.run_command(fail)
    LOGGER.warning("no %s", "\x1b[2Jpicture")
    shown = capsys.readouterr().err
    assert "\x1b" not in shown
    assert shown.count("\\x1b[2Jpicture") == 2


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_verb_has_help_of_its_own(name, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.dispatch([name, "--help"])
    assert caught.value.code == 0
    assert f"usage: fsr-fast {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", cli.VERBS)
def test_the_example_of_every_verb_is_accepted_by_its_parser(name):
    arguments = cli.VERBS[name].example.split(" > ")[0].split()
    cli.parser_of(name).parse_args(arguments)


def test_help_and_mistakes_need_no_torch():
    script = """
import sys
from fsr_fast import cli
for name in cli.VERBS:
    for last in ("--help", "--no-such-option"):
        try:
            cli.dispatch([name, last])
        except (SystemExit, cli.UserError):
            pass
    heavy = {"torch", "timm", "nvidia", "torchvision", "scipy", "matplotlib", "fsspec"} & set(sys.modules)
    assert not heavy, (name, heavy)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_printing_a_configuration_and_refusing_one_need_no_torch():
    script = """
import sys
from fsr_fast import cli
cli.dispatch(["train", "--print-config"])
try:
    cli.dispatch(["train", "--optim.iterations", "many"])
except cli.UserError:
    assert "torch" not in sys.modules
else:
    raise AssertionError
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def refusal(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        cli.dispatch(arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("predict --chekpoint x a.jpg", "unknown option '--chekpoint'; did you mean '--checkpoint'?"),
        ("train --optim.lr 3", "unknown option '--optim.lr'; did you mean '--optim.learning_rate'?"),
        ("train --optim 3", "--optim: expected a key of this section, --optim.KEY VALUE"),
        ("data check here --lables csv", "unknown option '--lables'; did you mean '--labels'?"),
        ("evaluate --checkpoint x --optim.seed 3", "in the sections run, data, cam, evaluate"),
        ("evaluate --checkpoint x --device gpu", "--device: input should be 'auto', 'cpu' or 'cuda', not gpu"),
        ("evaluate --checkpoint x --scales 0", "--scales.0: input should be greater than or equal to 0.1, not 0"),
        ("serve --checkpoint x --run.device gpu", "--run.device: input should be 'auto', 'cpu' or 'cuda', not gpu"),
        ("train --help optimiser", "--help: no section 'optimiser'; did you mean 'optim'?"),
    ],
)
def test_a_mistake_is_answered_with_the_option_as_it_was_written(line, answer):
    assert answer in refusal(*line.split())


def test_short_spellings_are_keys_of_the_configuration_and_lists_take_commas_and_spaces():
    parser = cli.parser_of("evaluate")
    spellings = {
        ("--root", "d"): ("data.root", "d"),
        ("--list", "val"): ("data.val_list", "val"),
        ("--scales", "1", "1.5"): ("evaluate.scales", ["1", "1.5"]),
        ("--scales", "1,1.5"): ("evaluate.scales", ["1", "1.5"]),
        ("--evaluate.scales", "[1, 1.5]"): ("evaluate.scales", [1, 1.5]),
        ("--no-flip",): ("evaluate.flip", "false"),
        ("--threshold=0.4",): ("evaluate.threshold", "0.4"),
        ("--limit", "3"): ("evaluate.limit", "3"),
        ("--device", "cpu"): ("run.device", "cpu"),
    }
    for words, (key, value) in spellings.items():
        found = given(parser.parse_args(["--checkpoint", "x", *words]))
        assert found == {key: Given(words[0].partition("=")[0], value)}
    assert given(cli.parser_of("pseudo-labels").parse_args(["--checkpoint", "x", "--output", "y", "--list", "z"])) == {
        "data.train_list": Given("--list", "z")
    }


def test_a_list_with_commas_takes_no_other_argument():
    options = cli.parser_of("data").parse_args(["check", "--classes", "cat,", "potted plant", "folder"])
    assert options.source == Path("folder")
    assert given(options)["data.classes"].value == ["cat", "potted plant"]


OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9_.-]*[a-z0-9]")
OF_OTHER_PROGRAMS = {"--max-restarts", "--nproc-per-node", "--ipc", "--shm-size"}


def options_of_messages() -> list[tuple[str, str]]:
    """Return each option that the text of a UserError or a ValueError names, with the module that raises it."""
    found = set()
    for path in sorted((ROOT / "fsr_fast").rglob("*.py")) + sorted((ROOT / "dataloading").rglob("*.py")):
        if "kernels" in path.parts or "fsr_fast/dataloading" in str(path):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("UserError", "ValueError"):
                texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
                words = {
                    word
                    for text in texts
                    if isinstance(text, str)
                    for word in OPTION.findall(text)
                    if not text.endswith(f"{word}.")  # the key follows
                }
                found |= {(str(path.relative_to(ROOT)), word) for word in words - OF_OTHER_PROGRAMS}
    return sorted(found)


def verbs_that_raise(module: str, option: str) -> list[str]:
    """Return the verbs whose users may read a message of a module."""
    own = {f"fsr_fast/commands/{name.replace('-', '_')}.py": [name] for name in cli.VERBS}
    trained = ["evaluate", "pseudo-labels", "predict", "serve", "report"]
    own["fsr_fast/commands/data_import.py"] = ["data"]
    own["fsr_fast/runtime/outputs.py"] = ["evaluate", "pseudo-labels", "predict"]
    if module in own:
        return own[module]
    if module.startswith("dataloading") and "." not in option:
        return ["data"]
    if module.startswith(("fsr_fast/evaluation", "fsr_fast/models/build.py")):
        return ["evaluate", "pseudo-labels"]
    section = option.removeprefix("--").partition(".")[0]
    if module.startswith("dataloading") and section == "data":
        return ["train", *trained, "data"]
    return ["train", "ablate", *(trained if section in TRAINED_SECTIONS else ())]


def test_every_option_that_a_message_names_is_taken_by_the_verbs_that_can_say_it():
    pairs = options_of_messages()
    assert len(pairs) > 30
    for module, option in pairs:
        for verb in verbs_that_raise(module, option):
            parser = cli.parser_of(verb)
            known = set(parser._option_string_actions)
            for action in parser._actions:
                for inner in (action.choices or {}).values() if isinstance(action.choices, dict) else ():
                    known |= set(inner._option_string_actions)
            assert option in known, f"{module} names {option}, which `fsr-fast {verb}` does not take"


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
    function = "_shtab_fsr_fast"
    call = f'COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; {function}; printf "%s\\n" "${{COMPREPLY[@]}}"'
    command = f"{script}\n{call}"
    result = subprocess.run(["bash", "--norc", "-c", command], capture_output=True, text=True, check=True)
    return result.stdout.split()


def test_bash_completes_verbs_options_and_choices(scripts):
    assert complete(scripts["bash"], "fsr-fast", "tr") == ["train"]
    assert set(complete(scripts["bash"], "fsr-fast", "")) == set(cli.VERBS)
    assert complete(scripts["bash"], "fsr-fast", "train", "--mask.ra") == ["--mask.ratio", "--mask.random_fraction"]
    assert complete(scripts["bash"], "fsr-fast", "predict", "--run.device", "c") == ["cpu", "cuda"]
    assert complete(scripts["bash"], "fsr-fast", "predict", "a.jpg", "--mask.ra") == []


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_scripts_of_other_shells_name_every_verb_and_pass_their_shell(scripts, shell):
    assert all(name in scripts[shell] for name in cli.VERBS)
    assert "mask.ratio" in scripts[shell]
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=scripts[shell], text=True, check=True)


def test_an_unknown_shell_is_refused():
    with pytest.raises(UserError, match="'tcsh'"):
        completion(["tcsh"])
