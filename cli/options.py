"""Options of the commands, made from the settings in `pyro_vje.config`."""

import functools
from collections import Counter
from collections.abc import Callable, Collection
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import click

from pyro_vje import config
from pyro_vje.plugins import is_reference

F = TypeVar("F", bound=Callable[..., Any])


class OneValue(click.Command):
    """Refuses an option that is given twice and takes one value: one of them would do nothing."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:  # noqa: D102
        given = Counter(self.make_parser(ctx).parse_args(args=list(args))[2])
        for option, times in given.items():
            if times > 1 and isinstance(option, click.Option) and not (option.multiple or option.is_eager):
                raise click.UsageError(f"{option.opts[0]} takes one value, and was given {times} times")
        return super().parse_args(ctx, args)


class OrNone(click.Choice):
    """Choices of which ``None`` is called none."""

    def normalize_choice(self, choice: Any, ctx: click.Context | None) -> str:  # noqa: D102
        return "none" if choice is None else str(choice)


class DataSet(click.Choice):
    """Built-in data sets, those of installed packages, and one's own as ``module:function``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: D102
        own = is_reference(value) or value in entry_points(group="pyro_vje.datasets").names
        return value if own else super().convert(value, param, ctx)


command = functools.partial(click.command, cls=OneValue)
EXISTING, ANY = click.Path(exists=True, path_type=Path), click.Path(path_type=Path)
KINDS: dict[Any, Any] = {bool: bool, int: int, float: float, config.Place: ANY}
SPECIAL: dict[str, Any] = {"dataset": DataSet(list(config.DATASET_DEFAULTS)), "data": EXISTING}
CKPT = "A run folder, or a weights file (.safetensors)."
ckpt = click.option("--ckpt", required=True, type=EXISTING, metavar="RUN", help=CKPT)
folder = click.option("--out", required=True, type=ANY, metavar="DIR", help="Folder of the results.")


def of(
    settings: type, *names: str, without: Collection[str] = (), repeated: Collection[str] = (), **changes: Any
) -> Callable[[F], F]:
    """Settings of a class as options, all or those named, with ``changes`` to what `click.option` takes."""

    def decorate(function: F) -> F:
        for name in reversed(names or [name for name in config.fields_of(settings) if name not in without]):
            function = _option(settings, name, name in repeated, changes)(function)
        return function

    return decorate


def _option(settings: type, name: str, repeated: bool, changes: dict[str, Any]) -> Callable[[F], F]:
    field = config.fields_of(settings)[name]
    extra: Any = field.json_schema_extra
    choices, default, off = config.choices_of(field), field.default, extra["off"]
    parts = (*get_args(field.annotation), field.annotation)
    kind = next((KINDS[part] for part in parts if part in KINDS), str)
    flag = "--" + name.replace("_", "-")
    values = default if isinstance(default, tuple) else () if default is None else (default,)
    shown = ", ".join(map(str, values))
    if kind is bool:
        shown = "" if not off else flag[2:] if default else off
    if repeated:
        default = values or None
    repeated = repeated or get_origin(field.annotation) is tuple
    help, _, told = (field.description or "").partition(" [default: ")
    told = told.removesuffix("]") or shown
    notes = "; ".join(filter(None, [f"default: {told}" if told else "", config.range_of(field)]))
    arguments = {
        "type": SPECIAL.get(name) or (OrNone(choices) if choices else kind),
        "multiple": repeated,
        "default": default,
        "is_flag": kind is bool or None,
        "help": help + " Repeatable." * repeated + f" [{notes}]" * bool(notes),
    }
    return click.option(f"{flag}/--{off}" if off else flag, **{**arguments, **changes})


SETTINGS = (config.TrainConfig, config.ScoreConfig, config.EvalConfig, config.MapConfig)
training, scoring, evaluation, mapping = (functools.partial(of, settings) for settings in SETTINGS)


def _take_recipe(ctx: click.Context, parameter: click.Parameter, name: str | None) -> None:
    if name is None:
        return
    several = {option.name: getattr(option, "multiple", False) for option in ctx.command.params}
    values = {key: "none" if value is None else value for key, value in config.load_recipe(name).items()}
    if absent := ", ".join(key for key in values if key not in several):
        raise click.UsageError(f"the recipe {name} sets {absent}, for which {ctx.info_name} has no option")
    ctx.default_map = {key: (value,) if several[key] else value for key, value in values.items()}


NAMES = ", ".join(config.RECIPES)
HELP = f"A published result's settings, below the options: {NAMES}, or a TOML file's path."
recipe = click.option(  # eager: before the options whose defaults it sets
    "--recipe", metavar="NAME", is_eager=True, expose_value=False, callback=_take_recipe, help=HELP
)


def train_config(settings: dict[str, Any]) -> config.TrainConfig:
    """The settings of a command, checked as far as can be done without torch, which loads slowly."""
    made = config.TrainConfig(**settings)
    made.resolved()
    place = Path(made.data_dir or "")
    if made.dataset in ("folder", "images") and not place.exists():
        raise FileNotFoundError(f"no such folder: {place.absolute()} (--data-dir)")
    return made
