"""Arguments and options that several commands share, and how a command tells what it made."""

from collections.abc import Callable, Iterable
from functools import reduce

from click import argument, option

from ..errors import StudyError


def options(told: str = "", **defaults: object) -> Callable:
    """An option for each of these names, with its default (whose type it has) and a help."""

    def add(command: Callable) -> Callable:
        for name, default in reversed(defaults.items()):
            flag = name.replace("_", "-")
            flags = f"--{flag}/--no-{flag}" if isinstance(default, bool) else f"--{flag}"
            command = option(flags, default=default, help=told, show_default=default != "")(command)
        return command

    return add


def several(name: str, told: str, *default: int | str, kind: type = str) -> Callable:
    """An option of words, or of whole numbers, with commas between them; ``none`` for none."""

    def read(text: str) -> list:
        try:
            return [kind(word) for word in text.split(",")] if text != "none" else []
        except ValueError:
            raise StudyError(f"--{name} {text!r}: give whole numbers with commas between them") from None

    shown = ",".join(map(str, default)) or "none"
    return option(f"--{name}", default=shown, type=read, metavar="A,B", help=told, show_default=True)


def together(*parts: Callable) -> Callable:
    """Several arguments and options as one decorator, in this order."""
    return lambda command: reduce(lambda made, part: part(made), reversed(parts), command)


runs = argument("runs", nargs=-1, metavar="[VARIANT/seedN]...")
tables, profile = argument("tables_dir"), argument("profile")
of_runs = together(argument("results_dir"), runs)
target = options("a name of the study, a hub id or a model folder", target="smollm2-135m-instruct")
device, dtype = options(device="auto"), options("auto, float32 or bfloat16", dtype="auto")
keep = options("folder of tables made before; rows of theirs that are not measured here stay", keep="")


def tell(lines: Iterable) -> None:
    """Print what was written, a line each."""
    print(*lines, sep="\n")
