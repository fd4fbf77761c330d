"""Print a script that completes verbs, options and their choices: `fsr-fast completion bash|zsh|fish`.

bash: `fsr-fast completion bash > ~/.fsr-fast.bash`, and `source ~/.fsr-fast.bash` in ~/.bashrc. zsh likewise. fish:
`fsr-fast completion fish > ~/.config/fish/completions/fsr-fast.fish`.
"""

import argparse
import importlib
import shlex
from collections.abc import Sequence

from fsr_fast.cli import VERBS, run_command
from fsr_fast.options import Parser


def main(arguments: Sequence[str]) -> None:
    """Print the script of one shell."""
    shell = build_parser().parse_args(arguments).shell
    parsers = {name: importlib.import_module(verb.module).build_parser() for name, verb in VERBS.items()}
    print(_fish(parsers) if shell == "fish" else _bash(parsers, zsh=shell == "zsh"))


def build_parser() -> Parser:
    """Build the parser of this verb."""
    parser = Parser("completion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    return parser


def _bash(parsers: dict[str, argparse.ArgumentParser], *, zsh: bool) -> str:
    cases = []
    for verb, parser in parsers.items():
        options = []
        for action in parser._actions:
            words = " ".join(map(str, action.choices or ()))
            if not action.option_strings:
                options.append(words)
                continue
            options += action.option_strings
            if words:
                names = "|".join(f"{verb}:{option}" for option in action.option_strings)
                cases.append(f"    {names}) words={shlex.quote(words)} ;;")
        cases.append(f"    {verb}:*) words={shlex.quote(' '.join(filter(None, options)))} ;;")
    lines = [
        *(["autoload -U +X bashcompinit && bashcompinit"] if zsh else []),
        "_fsr_fast() {",
        '  local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}" words=""',
        '  case "${COMP_WORDS[1]}:$previous" in',
        f"    *:fsr-fast) words={shlex.quote(' '.join(parsers))} ;;",
        *cases,
        "  esac",
        '  COMPREPLY=($(compgen -W "$words" -- "$current"))',
        "}",
        "complete -o default -F _fsr_fast fsr-fast",
    ]
    return "\n".join(lines)


def _fish(parsers: dict[str, argparse.ArgumentParser]) -> str:
    lines = []
    for verb, parser in parsers.items():
        lines.append(f"complete -c fsr-fast -f -n __fish_use_subcommand -a {verb} -d {_quote(VERBS[verb].purpose)}")
        for action in parser._actions:
            condition = f"complete -c fsr-fast -n '__fish_seen_subcommand_from {verb}'"
            choices = f" -xa {_quote(' '.join(map(str, action.choices)))}" if action.choices else ""
            text = "" if not action.help or action.help == argparse.SUPPRESS else f" -d {_quote(action.help)}"
            names = [f"-l {option[2:]}" for option in action.option_strings if option.startswith("--")]
            if names or choices:
                lines.append(f"{condition} {' '.join(names)}{choices}{text}")
    return "\n".join(lines)


def _quote(text: str) -> str:
    return "'" + " ".join(text.split()).replace("\\", "\\\\").replace("'", "\\'") + "'"


if __name__ == "__main__":
    run_command(main)
