"""Nodes of a configuration against the constructors that they name: checked all at once, then built.

A node with `_target_` may have just the keyword arguments of that class, of their types. No Hydra here: its own
`instantiate` runs whatever a file names.
"""

import difflib
import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from diffusion_trainer.callbacks.redaction import filled
from diffusion_trainer.conventions import UserError

PACKAGE = "diffusion_trainer"


class Schema(BaseModel):
    """Base of the schema of a verb's top level; fields typed dict are groups, checked by their constructors."""

    model_config = ConfigDict(extra="forbid", strict=True)


def check(config: Mapping[str, Any], schema: type[Schema]) -> None:
    """UserError with one line for each unknown key, missing value, wrong type or refused target."""
    wrong = []
    try:
        schema.model_validate(config)
    except ValidationError as error:
        for e in error.errors():
            name = ".".join(map(str, e["loc"]))
            if e["type"] == "extra_forbidden":
                wrong.append(f"{name}: there is no such option{hint(name, list(schema.model_fields))}")
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
    given = {k: v for k, v in node.items() if k not in ("_target_",)}
    for key, value in given.items():
        if key not in parameters:
            yield f"{path}.{key}: there is no such option{hint(f'{path}.{key}', [f'{path}.{p}' for p in parameters])}"
        elif any(isinstance(part, Mapping) and "_target_" in part for part in _parts(value)):
            yield from _check_node(value, f"{path}.{key}", allowed)
        else:
            yield from _check_type(value, parameters[key].annotation, f"{path}.{key}")
    for p in parameters.values():
        if p.default is p.empty and p.name not in given:
            yield f"{path}.{p.name} is missing: say {path}.{p.name}=..."


def _parts(value: Any) -> list[Any]:
    """What may be nodes: the value, or its items (a list or a mapping of parts)."""
    if isinstance(value, Mapping) and "_target_" not in value:
        return list(value.values())
    return value if isinstance(value, list) else [value]


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
    advice = ""
    if isinstance(value, float) and value.is_integer():
        advice = f"; write {int(value)}"
    if error["type"] == "string_type" and isinstance(value, int | float):
        advice = f"; quote it: {path}='\"{value}\"'"
    message = error["msg"].replace("an instance of Sequence", "a valid list")
    return f"{path}={value}: {message[0].lower()}{message[1:]}{advice}"


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


def build(node: Any, path: str, allowed: Sequence[str] = ()) -> Any:
    """The object that a checked node describes; UserError says where a constructor refused its arguments."""
    if isinstance(node, list):
        return [build(item, f"{path}[{i}]", allowed) for i, item in enumerate(node)]
    if isinstance(node, str):
        return filled(node)  # secrets are known here, and nowhere before
    if not isinstance(node, Mapping):
        return node
    parts = {k: build(v, f"{path}.{k}", allowed) for k, v in node.items() if k != "_target_"}
    if "_target_" not in node:
        return parts
    try:
        return target(node["_target_"], path, allowed)(**parts)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {error}") from error


def hint(name: str, valid: Sequence[str]) -> str:
    """; did you mean ...? The last part of a name counts as much as the whole."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    if not close:
        tails = {v.rsplit(".", 1)[-1]: v for v in reversed(valid)}
        close = [tails[t] for t in difflib.get_close_matches(name.rsplit(".", 1)[-1], list(tails), n=1, cutoff=0.7)]
    return f"; did you mean {close[0]}?" if close else ""
