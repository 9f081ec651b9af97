"""Cross products inside of one test: thousands of items would cost pytest more than their mathematics takes."""

import functools
import inspect
import itertools


def each(names, objects):
    """Runs a test once for each of some objects, as one item; stacked, for each of their product.

    names: the argument that takes the object, or a tuple of arguments that share a tuple. objects: name -> object, or
    a list, whose members are named by str(). All cases run; the first error is raised and names all that failed.
    """
    named = objects if isinstance(objects, dict) else {str(value): value for value in objects}
    if len(named) != len(objects) or not named:
        raise ValueError(f"{names}: there must be cases, and no two of the same name")
    one = isinstance(names, str)
    names = (names,) if one else names
    axis = [(name, dict(zip(names, (value,) if one else value, strict=True))) for name, value in named.items()]

    def decorate(test):
        axes, body = [axis, *test.__dict__.get("axes", [])], test.__dict__.get("body", test)

        @functools.wraps(test)
        def run(**fixtures):
            _run_all(body, list(itertools.product(*axes)), fixtures)

        run.axes, run.body, run.__signature__ = axes, body, _without(names, inspect.signature(test))
        return run

    return decorate


def _without(names, signature):
    missing = set(names) - set(signature.parameters)
    if missing:
        raise TypeError(f"the test takes no {', '.join(missing)}")
    return signature.replace(parameters=[p for p in signature.parameters.values() if p.name not in names])


def _run_all(body, cases, fixtures):
    failed = {}
    for case in cases:
        arguments = {name: value for _, values in case for name, value in values.items()}
        try:
            body(**fixtures, **arguments)
        except Exception as error:  # noqa: BLE001 (raised below, when all have run)
            failed["-".join(name for name, _ in case)] = error
    for first in failed.values():
        first.add_note(f"{len(failed)} of {len(cases)} cases failed, of which this is the first: {', '.join(failed)}")
        raise first
