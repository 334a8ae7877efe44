"""`prox24 eval`: see `prox24.perplexity`."""

import argparse

from prox24._cli import options


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.epilog = "Example: prox24 eval MODEL PRUNED --text a.txt --text b.jsonl"
    command.add_argument("models", nargs="+", metavar="MODEL", help=options.MODEL)
    options.add_windows(
        command, "text", "text to evaluate on (default: a novel of the package)", "all"
    )
    options.add_output(command)


def run(arguments: argparse.Namespace) -> int:
    from prox24._jobs.evaluate import perplexities
    from prox24._jobs.output import print_json, show, table

    texts = [options.text_of(arguments, source) for source in arguments.text or [None]]
    reports = perplexities(arguments.models, texts, arguments.quiet)
    every = [report for row in reports for report in row]
    if len(every) == 1:
        show(every[0], arguments)
    elif arguments.json:
        print_json({"rows": [report.to_dict() for report in every]})
    elif not arguments.quiet:
        columns = [f"{report.text}, {report.windows} windows" for report in reports[0]]
        rows = [[row[0].model, *(f"{each.perplexity:.3f}" for each in row)] for row in reports]
        print(table(["perplexity", *columns], rows))
    return 0
