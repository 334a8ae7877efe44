"""`prox24 distill`: see `prox24.distill`."""

import argparse
import dataclasses
from pathlib import Path

from prox24._cli import options
from prox24.refine._model import ModelRefinement


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("dense", help=f"the model that was pruned: {options.MODEL}")
    command.add_argument("pruned", help="HF folder of the pruned model")
    command.add_argument("destination", type=Path, help="HF folder to write")
    options.add_training_windows(command, "text", "text to train on")
    for field in dataclasses.fields(ModelRefinement):
        options.add_field(command, ModelRefinement, field.name)
    command.add_argument(
        "--tensor-parallel",
        type=options.positive,
        default=1,
        metavar="DEVICES",
        help="devices that share heads and widths; the others share the windows (default: 1)",
    )
    command.add_argument(
        "--state",
        type=Path,
        metavar="FOLDER",
        help="where the state of the training is kept; the same command goes on from there",
    )
    options.add_logs(command)
    options.add_overwrite(command)
    options.add_output(command)


def run(arguments: argparse.Namespace) -> int:
    from prox24._jobs.distill import distill
    from prox24._jobs.output import check_files, show
    from prox24._jobs.progress import written_logs

    text = options.text_of(arguments, arguments.text)
    inputs = (arguments.dense, arguments.pruned, *text.files)
    logs = arguments.log_file, arguments.metrics
    check_files((arguments.report, *logs), (*inputs, arguments.state), arguments.destination)
    names = [field.name for field in dataclasses.fields(ModelRefinement)]
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    with written_logs(*logs):
        report = distill(
            arguments.dense,
            arguments.pruned,
            arguments.destination,
            ModelRefinement(**given),
            text=text,
            state=arguments.state,
            tensor_parallel=arguments.tensor_parallel,
            overwrite=arguments.overwrite,
            quiet=arguments.quiet,
        )
    show(report, arguments)
    return 0
