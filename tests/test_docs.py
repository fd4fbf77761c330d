"""Every command and every piece of Python in the documentation runs.

Blocks of the pages run in the order of the site's contents, in one empty folder, with small data and short trainings.
A block titled `Installation` is not run. One titled `Needs …` or `Takes …` is parsed alone: options, recipe,
configuration. One titled `NAME.py` is a module of the reader's.
"""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fsr_fast import cli
from fsr_fast.config import load_config
from fsr_fast.dataloading import synthetic
from fsr_fast.errors import UserError

ROOT = Path(__file__).parents[1]
SMALL = {
    "train": (
        *("--optim.iterations=2", "--optim.batch_size=2", "--optim.warmup=0", "--loss.segmentation_start=0"),
        *("--run.picture_every=1", "--evaluate.limit=2"),
    ),
    "report": ("--limit=2", "--rows=1"),
}
"""What is appended to the commands of the pages."""
TESTED_ELSEWHERE = ("custom_data.md",)  # tests/test_custom_data.py
BLOCK = re.compile(r"^```(bash|sh|python)(?: title=\"([^\"]*)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose tags are not needed here."""


_Loader.add_multi_constructor("tag:", lambda *_: None)


def pages() -> list[Path]:
    contents = list(yaml.load((ROOT / "mkdocs.yml").read_text(), _Loader)["nav"])
    for entry in contents:  # sections are written out behind
        contents += next(iter(entry.values())) if isinstance(next(iter(entry.values())), list) else []
    paths = [path for entry in contents for path in entry.values() if isinstance(path, str)]
    return [ROOT / "docs" / path for path in paths if path not in TESTED_ELSEWHERE]


def commands(text: str) -> list[str]:
    """Split a block into commands: a line that ends in `\\` goes on, and so does a here-document."""
    found: list[str] = []
    waiting = ""
    for line in text.splitlines():
        if waiting or (found and found[-1].endswith("\\")):
            found[-1] = f"{found[-1]}\n{line}"
            waiting = "" if line == waiting else waiting
        elif line.strip() and not line.startswith("#"):
            found.append(line)
        document = re.search(r"<<'(\w+)'", line)
        waiting = document[1] if document else waiting
    return found


def words_of(command: str) -> list[str] | None:
    """Return verb and arguments of a command of ours, else None."""
    line = re.sub(r"\s+#.*", "", command.replace("\\\n", " "))
    match = re.match(r"(?:fsr-fast|python -m fsr_fast|torchrun .*?-m fsr_fast)(?:\.(\w+))?\s*(.*)", line)
    if match is None:
        return None
    verb = [match[1].replace("_", "-")] if match[1] else []
    return verb + shlex.split(match[2].partition(">")[0])


def check(command: str) -> None:
    """Check a command that is not run: the module of the repository that it starts, or the options of our verb."""
    module = re.search(r"python -m (bench\.\w+)", command)
    if module:
        assert (ROOT / f"{module[1].replace('.', '/')}.py").is_file(), command
    ours = re.search(r"(?:fsr-fast|torchrun|python -m fsr_fast\S*)\s.*", command, re.DOTALL)
    words = words_of(ours[0].removesuffix("&")) if ours else None
    if words:
        parse(words)


def parse(words: list[str]) -> None:
    verb, *arguments = words
    if verb == "train":
        load_config([*arguments, "--print-config"])
        return
    options = cli.parser_of(verb).parse_args(arguments)
    recipe = getattr(options, "config", None)
    if recipe is not None:
        load_config(["--config", str(recipe)])


def expand(words: list[str], folder: Path) -> list[str]:
    """Do the shell's work: a pattern that fits files becomes their names."""
    expanded = []
    for word in words:
        fitting = sorted(folder.glob(word)) if any(sign in word for sign in "*?") else []
        expanded += [str(path.relative_to(folder)) for path in fitting] or [word]
    return expanded


def run(command: str, folder: Path) -> None:
    words = words_of(command)
    if words is None:
        subprocess.run(["bash", "-euc", command], cwd=folder, check=True, capture_output=True)
        return
    if not words or "--help" in words:
        with contextlib.suppress(SystemExit):
            cli.dispatch(words)
        return
    verb, *arguments = expand(words, folder)
    cli.dispatch([verb, *arguments, *SMALL.get(verb, ())])


@pytest.fixture
def folder(tmp_path, monkeypatch, no_plugins) -> Path:
    synthetic.generate(tmp_path / "data/synthetic", train=24, val=6, processes=1)
    pictures = tmp_path / "data/synthetic/JPEGImages"
    for number in range(3):  # the pages name pictures of the whole set's validation list
        shutil.copy(pictures / f"creatures_{24 + number:06d}.jpg", pictures / f"creatures_{2000 + number:06d}.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setattr("fsr_fast.reporting.demo.DemoServer.serve_forever", lambda self: None)
    monkeypatch.setattr("fsr_fast.dataloading.synthetic.ensure", lambda root: None)
    return tmp_path


def test_every_block_runs(folder):
    counted = 0
    for page in pages():
        for language, title, text in BLOCK.findall(page.read_text()):
            try:
                if title == "Installation":
                    continue
                if title.endswith(".py"):
                    (folder / title).write_text(text)
                elif language == "python":
                    exec(compile(text, str(page), "exec"), {"__name__": "__main__"})
                for command in commands(text) if language != "python" else ():
                    if title.startswith(("Needs", "Takes")):
                        check(command)
                    else:
                        run(command, folder)
                counted += 1
            except (Exception, SystemExit) as error:
                pytest.fail(f"{page.name}: {text}\n{type(error).__name__}: {error}")
    assert counted >= 20
    assert (folder / "runs/mine/report.html").is_file()
    assert (folder / "my_network/README.md").is_file()
    assert (folder / "results/scores.json").is_file()
    assert "loss/certainty" in (folder / "runs/plugged/metrics.jsonl").read_text()


def test_the_commands_of_the_readme_are_known():
    for _, title, text in BLOCK.findall((ROOT / "README.md").read_text()):
        for command in commands(text):
            words = words_of(command)
            if title != "Installation" and words and "--help" not in words:
                parse(words)


def test_every_title_is_one_of_those_that_are_understood():
    for page in [*pages(), ROOT / "README.md"]:
        for _, title, _ in BLOCK.findall(page.read_text()):
            known = title in ("", "Installation") or title.startswith(("Needs ", "Takes ")) or title.endswith(".py")
            assert known, f"{page.name}: {title}"
        assert "```sh" not in page.read_text().replace("```shell", ""), f"{page.name}: write ```bash"


def test_every_page_of_the_folder_is_in_the_contents():
    folder = ROOT / "docs"
    assert {*folder.rglob("*.md")} == {*pages(), *(folder / name for name in TESTED_ELSEWHERE)}


def test_links_between_pages_lead_somewhere():
    for page in pages():
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_an_unknown_option_in_a_page_would_be_found():
    with pytest.raises(UserError, match="unknown option"):
        parse(["train", "--config", "voc_vit_b", "--data.rot", "x"])
    with pytest.raises(UserError, match="unknown option"):
        check("srun torchrun --nnodes 2 \\\n -m fsr_fast.train --config voc_vit_b --data.rot x &")
    with pytest.raises(AssertionError, match=r"bench\.stepp"):
        check("FSR_RECORD=1 python -m bench.stepp")
    assert commands("a \\\n  b\nc <<'E'\nd\nE\n# no\n\ne") == ["a \\\n  b", "c <<'E'\nd\nE", "e"]
    assert words_of("torchrun --nproc-per-node 4 -m fsr_fast.train --x 1  # so") == ["train", "--x", "1"]
