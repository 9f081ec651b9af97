"""Configurations: composed by Hydra, checked against the constructors they name, built by one function.

The folder conf/ is the registry and the constructor is the schema: a node with `_target_` may have just the keyword
arguments of that class, of their types. All mistakes are reported at once, each with the nearest valid name.
"""

import difflib
import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from diffusion_trainer.conventions import UserError

CONF = Path(__file__).resolve().parents[2] / "conf"
PACKAGE = "diffusion_trainer"


class Schema(BaseModel):
    """Base of the schema of a verb's top level; fields typed dict are groups, checked by their constructors."""

    model_config = ConfigDict(extra="forbid", strict=True)


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
        # A group chosen here is that option as its file has it: an experiment's values were for its own choice.
        plain = _compose(verb, [o.input_line for o in choices if o.key_or_group != "experiment"])
        for o in choices:
            if o.key_or_group in plain and o.key_or_group in schema.model_fields:
                OmegaConf.update(config, o.key_or_group, plain[o.key_or_group], merge=False)
    chosen = {o.key_or_group for o in choices}
    for name, node in (known or {}).items():
        if name not in chosen:
            OmegaConf.update(config, name, node, merge=False, force_add=True)
    values = [o for o in parsed if o not in choices]
    _check_keys(config, values)
    for o in values:
        OmegaConf.update(config, o.key_or_group, o.value(), merge=True, force_add=True)
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise UserError(f"configuration: {_first_line(error)}") from error
    plain = {k: v for k, v in plain.items() if k != "experiment"}
    check(plain, schema)
    return plain


def _parse(overrides: Sequence[str]) -> list[Override]:
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise UserError(
            f"cannot read the arguments: {_first_line(error)}\nThey look like group=option or key=value"
        ) from error
    for o in parsed:
        if o.is_sweep_override():
            raise UserError(f"{o.input_line}: several values are a sweep, which this command does not do; give one")
        if o.is_delete():
            raise UserError(f"{o.input_line}: nothing can be deleted; set it to null instead")
    return parsed


def value_of(overrides: Sequence[str], key: str) -> Any:
    """What an override sets a key to; None if none does."""
    values = [o.value() for o in _parse(overrides) if o.key_or_group == key]
    return values[-1] if values else None


def _is_group(name: str) -> bool:
    return (CONF / name).is_dir()


def _check_options(choices: Sequence[Override]) -> None:
    wrong = []
    for o in choices:
        options = sorted(p.stem for p in (CONF / o.key_or_group).glob("*.yaml"))
        if isinstance(o.value(), str) and o.value() not in options:
            wrong.append(f"{o.input_line}: there is no such option{_hint(o.value(), options)}; {o.key_or_group} is one "
                         f"of {', '.join(options)}")  # fmt: skip
    if wrong:
        raise UserError("\n".join(wrong))


def _compose(verb: str, overrides: list[str]):
    try:
        return compose(verb, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"configuration: {_first_line(error)}") from error


def _check_keys(config, overrides: Sequence[Override]) -> None:
    """Every key that an override sets exists (a `+` may add one; then the constructors decide)."""
    names = list(_names(OmegaConf.to_container(config, resolve=False)))
    groups = sorted(p.name for p in CONF.iterdir() if p.is_dir())
    wrong = [
        f"{o.input_line}: there is no option {o.key_or_group}{_hint(o.key_or_group, names + groups)}"
        for o in overrides
        if not o.is_add() and not o.is_force_add() and o.key_or_group not in names
    ]
    if wrong:
        raise UserError("\n".join(wrong))


def _names(node: Any, path: str = "") -> Iterator[str]:
    """Every dotted key."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            name = f"{path}.{key}" if path else str(key)
            yield name
            yield from _names(value, name)


def _hint(name: str, valid: Sequence[str]) -> str:
    """; did you mean ...? The last part of a name counts as much as the whole."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    if not close:
        tails = {v.rsplit(".", 1)[-1]: v for v in reversed(valid)}
        close = [tails[t] for t in difflib.get_close_matches(name.rsplit(".", 1)[-1], list(tails), n=1, cutoff=0.7)]
    return f"; did you mean {close[0]}?" if close else ""


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()


# ---- checking: every node against the constructor that it names ------------------------------------------------------


def check(config: Mapping[str, Any], schema: type[Schema]) -> None:
    """UserError with one line for each unknown key, missing value, wrong type or refused target."""
    wrong = []
    try:
        schema.model_validate(config)
    except ValidationError as error:
        for e in error.errors():
            name = ".".join(map(str, e["loc"]))
            if e["type"] == "extra_forbidden":
                wrong.append(f"{name}: there is no such option{_hint(name, list(schema.model_fields))}")
            else:
                wrong.append(_wrong_type(name, e, config.get(str(e["loc"][0]))))
    for name, node in config.items():
        if name in schema.model_fields:
            wrong += _check_node(node, name, tuple(config.get("allowed_targets") or ()))
    if wrong:
        raise UserError("\n".join(wrong))


def _check_node(node: Any, path: str, allowed: tuple[str, ...]) -> Iterator[str]:
    if isinstance(node, list):
        for i, item in enumerate(node):
            yield from _check_node(item, f"{path}[{i}]", allowed)
    if not isinstance(node, Mapping):
        return
    if "_target_" not in node:
        for key, value in node.items():
            yield from _check_node(value, f"{path}.{key}", allowed)
        return
    try:
        parameters = inspect.signature(target(node["_target_"], path, allowed)).parameters
    except UserError as error:
        yield str(error)
        return
    given = {k: v for k, v in node.items() if k not in ("_target_", "_partial_")}
    for key, value in given.items():
        if key not in parameters:
            yield f"{path}.{key}: there is no such option{_hint(f'{path}.{key}', [f'{path}.{p}' for p in parameters])}"
        elif isinstance(value, Mapping) and "_target_" in value:
            yield from _check_node(value, f"{path}.{key}", allowed)
        else:
            yield from _check_type(value, parameters[key].annotation, f"{path}.{key}")
    if not node.get("_partial_"):
        for p in parameters.values():
            if p.default is p.empty and p.name not in given:
                yield f"{path}.{p.name} is missing: say {path}.{p.name}=..."


def _check_type(value: Any, annotation: Any, path: str) -> Iterator[str]:
    if value == "???":
        yield f"{path} is missing: say {path}=..."
    elif annotation is not inspect.Parameter.empty:
        try:
            adapter = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True, strict=True))
            adapter.validate_python(value)
        except ValidationError as error:
            yield _wrong_type(path, error.errors()[0], value)


def _wrong_type(path: str, error: Mapping[str, Any], value: Any) -> str:
    if error["type"] == "missing" or value == "???":
        return f"{path} is missing: say {path}=..."
    if isinstance(value, str) and "number" in value:
        value = str(value)
    return f"{path}={value}: {error['msg'][0].lower()}{error['msg'][1:]}"


def target(name: str, path: str, allowed: Sequence[str] = ()) -> type:
    """The class that `_target_` names, of this package or of a module in `allowed_targets`; no other is imported."""
    roots = (PACKAGE, *allowed)
    if not any(name == r or name.startswith(f"{r}.") for r in roots):
        raise UserError(
            f"{path}._target_: {name} is outside {', '.join(roots)}; allow a module of yours: allowed_targets=[it]"
        )
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{path}._target_: there is no {name} ({error})") from error
    # A class that a module merely imports (os.popen through a module of ours) is not the module's.
    if not inspect.isclass(found) or not any(f"{found.__module__}.".startswith(f"{r}.") for r in roots):
        raise UserError(f"{path}._target_: {name} is not a class of {', '.join(roots)}")
    return found


# ---- building --------------------------------------------------------------------------------------------------------


def build(node: Any, path: str, allowed: Sequence[str] = ()) -> Any:
    """The object that a checked node describes; UserError says where a constructor refused its arguments."""
    if isinstance(node, list):
        return [build(item, f"{path}[{i}]", allowed) for i, item in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    parts = {k: build(v, f"{path}.{k}", allowed) for k, v in node.items() if k != "_target_"}
    if "_target_" not in node:
        return parts
    try:
        return target(node["_target_"], path, allowed)(**parts)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {error}") from error


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
