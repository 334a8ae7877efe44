"""Recipes in YAML, by PyYAML if it is installed."""

import re
from typing import Any

from prox24.errors import RecipeError


def from_yaml(text: str) -> Any:
    """The object of a YAML text, with the numbers that JSON would have.

    An empty text is a recipe without fields.

    Raises:
      RecipeError: the text is not YAML, or PyYAML is not installed.
    """
    yaml = _yaml()
    try:
        given = yaml.load(text, _json_numbers(yaml))
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"the recipe is not YAML: {reason}") from error
    return {} if given is None else given


def to_yaml(fields: dict[str, Any]) -> str:
    """YAML that `from_yaml` reads.

    Raises:
      RecipeError: PyYAML is not installed.
    """
    return str(_yaml().safe_dump(fields, sort_keys=False))


def _yaml() -> Any:
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError as error:
        raise RecipeError("PyYAML is not installed: pip install pyyaml, or use JSON") from error
    return yaml


def _json_numbers(yaml: Any) -> Any:
    """A safe loader that reads 1e-2 as a number and 2:4 as text; YAML 1.1 reads 2:4 as 124."""

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        pass

    Loader.yaml_implicit_resolvers = {
        first: [pair for pair in pairs if not pair[0].endswith((":int", ":float"))]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for kind, number in (("int", r"-?\d+$"), ("float", r"-?\d+(\.\d*)?([eE][-+]?\d+)?$")):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(number), "-0123456789")
    return Loader
