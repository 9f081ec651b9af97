"""Configurations: composed by Hydra from the folder conf/, which is the registry, and checked as a whole.

All mistakes are reported at once, each with the nearest valid name (see nodes.py for the checks of each node).
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString, ValueType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffusion_trainer.apps.keys import CONF, advice
from diffusion_trainer.apps.nodes import Schema, check, hint
from diffusion_trainer.callbacks.redaction import literally, mapped, referring, written_out
from diffusion_trainer.conventions import UserError


def load(verb: str, overrides: Sequence[str], schema: type[Schema], known: Mapping[str, Any] | None = None) -> dict:
    """The resolved configuration of conf/<verb>.yaml with overrides, checked; UserError lists all that is wrong.

    known: groups that come from elsewhere (a finished run's configuration) unless an override chooses them.
    """
    if not CONF.is_dir():
        raise UserError(f"no folder {CONF}: install the project from its checkout (pip install --editable .)")
    parsed = _parse(overrides)
    with initialize_config_dir(str(CONF), version_base="1.3", job_name=verb):
        choices = [o for o in parsed if _is_group(o.key_or_group)]
        _check_options(choices)
        config = _compose(verb, [o.input_line for o in choices])
        groups = [o for o in choices if o.key_or_group != "experiment"]
        if groups and len(groups) < len(choices):
            # A group chosen here is that option as its file has it: an experiment's values were for its own choice.
            plain = _compose(verb, [o.input_line for o in groups])
            for o in groups:
                if o.key_or_group in schema.model_fields:
                    OmegaConf.update(config, o.key_or_group, plain[o.key_or_group], merge=False)
    chosen = {o.key_or_group for o in choices}
    for name, node in (known or {}).items():
        if name not in chosen:
            OmegaConf.update(config, name, mapped(node, literally), merge=False, force_add=True)
    values = [o for o in parsed if o not in choices]
    _check_keys(config, values)
    for o in values:
        OmegaConf.update(config, o.key_or_group, o.value(), merge=True, force_add=True)
    plain = _resolved(config)
    plain = {k: v for k, v in plain.items() if k != "experiment"}
    check(plain, schema)
    return plain


def _resolved(config) -> dict:
    """But for what names secrets: that is for `build`."""
    try:
        kept = OmegaConf.create(mapped(OmegaConf.to_container(config, resolve=False), referring))
        return OmegaConf.to_container(kept, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise UserError(f"configuration: {_first_line(error)}") from error


def _parse(overrides: Sequence[str]) -> list[Override]:
    parsed = _read(overrides)
    for o in parsed:
        if o.is_sweep_override():
            raise UserError(f"{o.input_line}: several values are a sweep; add -m to run them one after the other")
        if o.is_delete():
            raise UserError(f"{o.input_line}: nothing can be deleted; set it to null instead")
        if name := next(written_out(o.value(), o.key_or_group), None):
            raise UserError(
                f"{o.key_or_group}: the value of {name} stands there, and would in files: write "
                f"'${{oc.env:{name}}}' in single quotes so that the shell leaves it alone"
            )
    return parsed


def _read(overrides: Sequence[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise UserError(
            f"cannot read the arguments: {_first_line(error)}\nThey look like group=option or key=value"
        ) from error


def swept(overrides: Sequence[str]) -> list[str]:
    """Those of the overrides that have several values."""
    return [o.input_line for o in _read(overrides) if o.is_sweep_override()]


def expand(overrides: Sequence[str]) -> list[tuple[list[str], list[str]]]:
    """The product of all sweeps, the last one turning fastest: each point's overrides and which of them are swept."""
    parsed = _read(overrides)
    given = Counter(o.key_or_group for o in parsed)
    sweeps = [o for o in parsed if o.is_sweep_override()]
    if not sweeps:
        raise UserError("a sweep needs a key with several values: key=a,b or key=range(1,4) or key=choice(a,b)")
    for o in sweeps:
        if given[o.key_or_group] > 1:
            raise UserError(f"{o.input_line}: {o.key_or_group} is given twice; give its values once: key=a,b")
    points = itertools.product(*(_values(o) if o in sweeps else [o.input_line] for o in parsed))
    return [(list(p), [text for text, o in zip(p, parsed, strict=True) if o in sweeps]) for p in points]


@dataclass(frozen=True)
class Axis:
    """One swept key of a search: some overrides, or an interval of numbers."""

    key: str
    choices: tuple[str, ...] = ()  # key=value
    low: float = 0.0  # an int where the key takes whole numbers; the same for high
    high: float = 0.0
    log: bool = False

    @property
    def ends(self) -> tuple[str, ...]:
        """The overrides at its edge: all choices, or both ends."""
        return self.choices or (self.at(self.low), self.at(self.high))

    def at(self, value: float) -> str:
        return f"{self.key}={value!r}"


def axes(overrides: Sequence[str]) -> list["str | Axis"]:
    """The overrides in their order, those that are swept as axes; interval() and tag(log, ...) are allowed."""
    parsed = _read(overrides)
    given = Counter(o.key_or_group for o in parsed)
    for o in parsed:
        if o.is_sweep_override() and given[o.key_or_group] > 1:
            raise UserError(f"{o.input_line}: {o.key_or_group} is given twice; give its values once")
    found = [_axis(o) if o.is_sweep_override() else o.input_line for o in parsed]
    if not any(isinstance(axis, Axis) for axis in found):
        raise UserError("a search needs a key with several values: key=interval(0,1) or key=a,b or key=range(1,4)")
    return found


def _axis(sweep: Override) -> Axis:
    key, value = sweep.get_key_element(), sweep.value()
    if sweep.value_type != ValueType.INTERVAL_SWEEP:
        return Axis(key, tuple(_values(sweep)))
    if value.tags - {"log"}:
        raise UserError(f"{sweep.input_line}: the only tag is log, as in {key}=tag(log,interval(1e-4,1e-2))")
    log = "log" in value.tags
    if not value.start < value.end or (log and value.start <= 0):
        raise UserError(f"{sweep.input_line}: it must go from less to more" + (", both positive" if log else ""))
    return Axis(key, (), value.start, value.end, log)


def _values(sweep: Override) -> list[str]:
    if sweep.value_type not in (ValueType.SIMPLE_CHOICE_SWEEP, ValueType.CHOICE_SWEEP, ValueType.RANGE_SWEEP):
        raise UserError(
            f"{sweep.input_line}: its values are not known; list them: key=a,b, choice(a,b), range(1,4); or search an "
            "interval: sweeper=tpe"
        )
    key = sweep.get_key_element()
    values = [
        assignment(key, value) if isinstance(value, str) and not _is_plain(value) else f"{key}={text}"
        for value, text in zip(sweep.sweep_iterator(), sweep.sweep_string_iterator(), strict=True)
    ]
    if not values or len(set(values)) < len(values):
        raise UserError(f"{sweep.input_line}: " + ("a value stands twice; once is enough" if values else "is empty"))
    return values


def _is_plain(text: str) -> bool:
    # Hydra forgets the quotes inside choice(...): '1' would come back as a number, "it's" not at all.
    return bool(re.fullmatch(r"[A-Za-z0-9_./-]+", text)) and _read([f"key={text}"])[0].value() == text


def assignment(key: str, text: str) -> str:
    """The override that sets a key to just this text, whatever characters it has."""
    return f"{key}={QuotedString(text, Quote.single).with_quotes()}"


def value_of(overrides: Sequence[str], key: str) -> Any:
    """What an override sets a key to; None if none does."""
    values = [o.value() for o in _parse(overrides) if o.key_or_group == key]
    return values[-1] if values else None


def within(overrides: Sequence[str], group: str) -> list[str]:
    """The overrides that choose an option of the group or set a key inside of it."""
    return [o.input_line for o in _parse(overrides) if f"{o.key_or_group}.".startswith(f"{group}.")]


def _is_group(name: str) -> bool:
    return (CONF / name).is_dir()


def _check_options(choices: Sequence[Override]) -> None:
    wrong = []
    for o in choices:
        options = sorted(p.stem for p in (CONF / o.key_or_group).glob("*.yaml"))
        if o.value() is None or (isinstance(o.value(), str) and o.value() not in options):
            wrong.append(
                f"{o.input_line}: there is no such option{hint(str(o.value()), options)}; "
                f"{o.key_or_group} is one of {', '.join(options)}"
            )
    if wrong:
        raise UserError("\n".join(wrong))


def _compose(verb: str, overrides: list[str]):
    try:
        return compose(verb, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        if group := re.search(r"Could not override '([^']+)'", str(error)):
            raise UserError(f"{verb} has no group {group[1]}{advice(group[1], (), ())}") from error
        raise UserError(f"configuration: {_first_line(error)}") from error


def _check_keys(config, overrides: Sequence[Override]) -> None:
    """Every key that an override sets exists (a `+` may add one; then the constructors decide)."""
    names = list(_names(OmegaConf.to_container(config, resolve=False)))
    groups = sorted(p.name for p in CONF.iterdir() if p.is_dir())
    wrong = [
        f"{o.input_line}: there is no option {o.key_or_group}{advice(o.key_or_group, names, groups)}"
        for o in overrides
        if not o.is_add() and not o.is_force_add() and o.key_or_group not in names
    ]
    if wrong:
        raise UserError("\n".join(wrong))


def _names(node: Any, path: str = "") -> Iterator[str]:
    """Every dotted key; the items of a list are numbered."""
    if isinstance(node, Mapping | list):
        for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
            name = f"{path}.{key}" if path else str(key)
            yield name
            yield from _names(value, name)


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()


def dump(config: Mapping[str, Any]) -> str:
    """As YAML, in its own order."""
    return yaml.safe_dump(dict(config), sort_keys=False, default_flow_style=None, width=120)


def read(path: Path) -> dict:
    """A configuration that `dump` wrote; UserError if it is missing or is none."""
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({_first_line(error)})") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a run's configuration")
    return config
