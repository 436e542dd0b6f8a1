"""The programs' flags: those that they share, and one for every field of a recipe or protocol."""

import argparse
import json
import os
import sys
import types
from dataclasses import field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import torch

from parts.backbone import fill_in_model
from parts.machine import Machine
from parts.processes import fail, join_processes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_VALUE_HELP = (
    "white in images of more than 8 bits, such as 4095 (default: the largest that 16 bits can hold)"
)
Fields = TypeVar("Fields")  # a recipe or protocol: a frozen dataclass of flag()


def common_flags(
    parser: argparse.ArgumentParser, batch_size: int = 256, max_value: bool = True
) -> None:
    """The flags of every evaluation; --max-value where it reads images by parts/sources.py."""
    add = parser.add_argument
    add("--data", type=Path, required=True, help="a folder; what it may hold is in the README")
    add("--model", help="a timm model, or torchvision/NAME (default: the checkpoint's, if its file "
        "says, else resnet50)")  # fmt: skip
    add("--model-args", type=partial(json_object, "--model-args"),
        help="JSON, for the model's constructor (default: as --model)")  # fmt: skip
    add("--small-stem", action="store_true", help="a ResNet's first layers for 32 px")
    add("--checkpoint", help="a file for checkpoint.load_backbone, or timm; none: random weights")
    add("--padding", choices=("same", "torch"), help="for DeepMind's weights, which need same")
    if max_value:
        add("--max-value", type=float, help=MAX_VALUE_HELP)
    else:
        parser.set_defaults(max_value=None)
    add("--output", type=Path, default=Path("runs") / Path(sys.argv[0]).stem, help="a folder")
    add("--json", type=Path, help="where the figures go (default: OUTPUT/results.json)")
    add("--image-size", type=int, help="pixels (default: the checkpoint's or the model's)")
    add("--batch-size", type=int, default=batch_size, help="images of one forward pass")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that decode")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=DTYPES, default="fp32", help="of the backbone's forward pass")
    add("--seed", type=int, default=0)


def set_up(args: argparse.Namespace, join: bool = True) -> Machine:
    """Join torchrun's processes, if asked to, and make the folder for the results.

    Ends the program where the common flags cannot work. args.device is then this process's own.
    """
    if join:
        args.device = str(join_processes(args.device))
    check_at_least(1, args, "batch_size", "image_size")
    check_at_least(0, args, "workers")
    check_at_least(1e-9, args, "max_value")
    fill_in_model(args, args.checkpoint)
    try:
        device = torch.empty(0, device=args.device).device
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}")
    args.output.mkdir(parents=True, exist_ok=True)
    return Machine(device, DTYPES[args.dtype], args.batch_size, args.workers)


def check_at_least(least: float, flags: Any, *names: str) -> None:
    """End the program at the first of these flags of which a value is less."""
    for name in names:
        value = getattr(flags, name)
        each = value if isinstance(value, tuple | list) else (value,)
        if any(one is not None and one < least for one in each):
            fail(f"--{name.replace('_', '-')} {value}; expected at least {least}.")


def json_object(flag: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        fail(f"{flag} {text} is no JSON object, such as '{{\"name\": 0.1}}'.")
    return value


class WithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Says a flag's default in --help where it has one and the text does not say it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


# Recipes and protocols --------------------------------------------------------------------------


def flag(text: str, **default: Any) -> Any:
    """A field of a recipe or protocol, and what --help says of it and its default's source."""
    return field(metadata={"help": text}, **default)


def add_flags(group: Any, choices: dict[str, Any]) -> None:
    """One for every field of the recipes or protocols; None where it is not given."""
    kind = type(next(iter(choices.values())))
    hints = get_type_hints(kind)
    for f in fields(kind):
        values = {name: getattr(choice, f.name) for name, choice in choices.items()}
        listed = ", ".join(f"{name} {shown(value)}" for name, value in values.items())
        text = f"{f.metadata['help']} (default: {listed})".replace("%", "%%")
        hint = hints[f.name]
        how: dict[str, Any] = {"type": hint}
        if hint is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif isinstance(hint, types.GenericAlias):  # tuple[int, ...]
            how = {"type": get_args(hint)[0], "nargs": "*" if () in values.values() else "+"}
        group.add_argument("--" + f.name.replace("_", "-"), default=None, help=text, **how)


def shown(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def with_flags(default: Fields, args: argparse.Namespace) -> Fields:
    """`default` with those fields changed that the command line gives."""
    given = {f.name: getattr(args, f.name) for f in fields(default)}  # type: ignore[arg-type]
    given = {n: tuple(v) if isinstance(v, list) else v for n, v in given.items() if v is not None}
    return replace(default, **given)  # type: ignore[type-var]


def protocol_parser(description: str, protocols: dict[str, Any]) -> argparse.ArgumentParser:
    """A parser with the common flags and one for every field of the protocols' dataclass."""
    parser = argparse.ArgumentParser(
        description=f"{description} The same command goes on where an earlier one was stopped.",
        conflict_handler="resolve",  # a protocol's flag goes before a common one
    )
    common_flags(parser, max_value=False)
    parser.set_defaults(workers=min(4, os.cpu_count() or 1))
    add = parser.add_argument
    add("--dtype", choices=DTYPES, default="fp32", help="of autocast; fp16 scales the loss")
    add("--classes", type=lambda names: names.split(","), help="their names, with commas between")
    add("--eval-every", type=int, default=2000, help="steps; the last one is always evaluated")
    add("--save-every", type=int, default=500, help="steps")
    add("--log-every", type=int, default=20, help="steps")
    add("--test-only", type=Path, metavar="LAST.PT",
        help="score the network of an earlier run with the same flags, and train none")  # fmt: skip
    add("--protocol", choices=protocols, default=next(iter(protocols)),
        help="what the flags below default to (default: %(default)s)")  # fmt: skip
    group = parser.add_argument_group("protocol", "published defaults, with their sources")
    add_flags(group, protocols)
    return parser


def parse_protocol(
    parser: argparse.ArgumentParser, protocols: dict[str, Fields], argv: list[str] | None
) -> tuple[argparse.Namespace, Fields]:
    """The flags as they are given, and the protocol that they make."""
    args = parser.parse_args(argv)
    protocol: Any = with_flags(protocols[args.protocol], args)
    check_at_least(1, protocol, "iterations")
    check_at_least(1, args, "eval_every", "save_every", "log_every")
    return args, protocol
