"""`prox24 plan`: see `prox24.plan`."""

import argparse

from prox24._cli import options


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", help=options.MODEL)
    options.add_recipe(command)
    options.add_sizes(command)
    command.set_defaults(samples=64)
    command.add_argument(
        "--devices", type=options.positive, default=1, help="devices that share the work"
    )
    command.add_argument(
        "--memory",
        type=options.size,
        metavar="SIZE",
        help="memory of a device, as 80GB: does the job fit?",
    )
    command.add_argument(
        "--shard-grams", action="store_true", help="devices share the columns of Grams"
    )
    options.add_output(command, quiet="nothing but JSON, if it is asked for")


def run(arguments: argparse.Namespace) -> int:
    recipe = options.recipe_of(arguments)
    from prox24._jobs.output import show
    from prox24._jobs.plan import plan

    found = plan(
        arguments.source,
        recipe,
        samples=arguments.samples,
        sequence_length=arguments.sequence_length,
        devices=arguments.devices,
        memory=arguments.memory,
        shard_grams=arguments.shard_grams,
    )
    show(found, arguments)
    return 0
