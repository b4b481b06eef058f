"""The paper's experiments: published settings as JSON, baselines in the same harness, results as JSON lines."""

from .config import Recipe, load_recipe, recipe_names
from .methods import Method, expand_methods, parse_method
from .results import append_row, read_rows
from .runner import Limits, run_recipe
from .summary import write_summary

__all__ = [
    "Limits",
    "Method",
    "Recipe",
    "append_row",
    "expand_methods",
    "load_recipe",
    "parse_method",
    "read_rows",
    "recipe_names",
    "run_recipe",
    "write_summary",
]
