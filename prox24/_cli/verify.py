"""`prox24 verify`: see `prox24.verify`."""

import argparse

from prox24._cli import options


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help=options.MODEL)
    command.add_argument("--source", help="the model that it was pruned from")
    command.add_argument(
        "--report", type=options.report_file, metavar="FILE", help="write a report, .json or .html"
    )
    command.add_argument(
        "--pattern",
        type=options.pattern,
        metavar="N:M",
        help="of every linear, or P%% of zeros (default: that of the folder's manifest, else 2:4)",
    )
    options.add_output(command)


def run(arguments: argparse.Namespace) -> int:
    from prox24._jobs.output import check_files, show
    from prox24._jobs.verify import verify

    check_files([arguments.report], (arguments.model, arguments.source))
    found = verify(arguments.model, arguments.source, arguments.pattern, quiet=arguments.quiet)
    show(found, arguments)
    if arguments.quiet and not arguments.json:
        print(*found.problem_lines(), sep="\n", end="\n" if found.problems else "")
    return 0 if found.ok else 1
