"""`prox24 eval`: see `prox24.perplexity`."""

import argparse

from prox24._cli import options


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help=options.MODEL)
    options.add_windows(command, "text", "UTF-8 text (default: a novel of the package)", "all")
    options.add_output(command)


def run(arguments: argparse.Namespace) -> int:
    from prox24._jobs.evaluate import perplexity
    from prox24._jobs.output import show
    from prox24._jobs.text import Text

    text = Text(arguments.text, arguments.samples, arguments.sequence_length)
    show(perplexity(arguments.model, text, quiet=arguments.quiet), arguments)
    return 0
