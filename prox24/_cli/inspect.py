"""`prox24 inspect`: lists the tensors of a model, and a recipe's decision on each."""

import argparse

from prox24._cli import options


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", help=options.MODEL)
    options.add_recipe(command)
    options.add_output(command, quiet="nothing")


def run(arguments: argparse.Namespace) -> int:
    recipe = options.recipe_of(arguments)
    from prox24._jobs.inspect import inspect_model
    from prox24._jobs.output import show

    show(inspect_model(arguments.source, recipe), arguments)
    return 0
