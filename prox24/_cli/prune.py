"""`prox24 prune`: see `prox24.prune`."""

import argparse
import contextlib
from pathlib import Path

from prox24._cli import options
from prox24.errors import Prox24Error


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.epilog = "Example: prox24 prune MODEL OUT --calibration text.txt --report report.json"
    command.add_argument("source", help=options.MODEL)
    command.add_argument("destination", type=Path, help="HF folder to write")
    options.add_recipe(command)
    options.add_training_windows(command, "calibration", "text to calibrate on")
    command.add_argument(
        "--memory",
        type=options.size,
        metavar="SIZE",
        help="memory of the device, as 8GiB: the largest micro-batch that fits is used",
    )
    command.add_argument(
        "--activations",
        choices=("memory", "disk"),
        default="memory",
        help="where hidden states are between layers; with disk, a run that was interrupted does "
        "not run the finished layers again",
    )
    command.add_argument(
        "--shard-grams",
        action="store_true",
        help="devices share the columns of Grams and weights, not the rows of weights",
    )
    options.add_logs(command)
    command.add_argument(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="upload the complete folder to the Hugging Face hub; a new model is public, unless "
        "the owner's settings say otherwise",
    )
    options.add_writing(command)
    options.add_output(command)
    group = command.add_argument_group(
        "several processes",
        "Each process runs the same command. Under Slurm, Open MPI 4, and on TPU VMs or GKE with "
        "TPUs they find each other; elsewhere give the last three options.",
    )
    group.add_argument(
        "--distributed", action="store_true", help="share the work with other processes"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument(
        "--num-processes", type=options.positive, metavar="N", help="the number of processes"
    )
    group.add_argument(
        "--process-id", type=options.index, metavar="I", help="the number of this process, from 0"
    )


def run(arguments: argparse.Namespace) -> int:
    place = (arguments.coordinator, arguments.num_processes, arguments.process_id)
    if not arguments.distributed and place != (None, None, None):
        raise Prox24Error("--coordinator, --num-processes and --process-id are for --distributed")
    recipe = options.recipe_of(arguments)
    from prox24._checkpoints import hub
    from prox24._jobs.output import check_files, show
    from prox24._jobs.processes import connected, is_first
    from prox24._jobs.progress import written_logs
    from prox24._jobs.prune import prune

    name: str | None = arguments.push_to_hub
    if name is not None:
        hub.check_upload(name)
    text = options.text_of(arguments, arguments.calibration)
    logs = arguments.log_file, arguments.metrics
    inputs = (arguments.source, arguments.recipe, *text.files)
    check_files((arguments.report, *logs), inputs, arguments.destination)
    with (
        connected(*place) if arguments.distributed else contextlib.nullcontext(),
        written_logs(*logs),
    ):
        report = prune(
            arguments.source,
            arguments.destination,
            recipe,
            calibration=text,
            memory=arguments.memory,
            activations=arguments.activations,
            shard_grams=arguments.shard_grams,
            shard_size=arguments.shard_size,
            overwrite=arguments.overwrite,
            quiet=arguments.quiet,
        )
        first = is_first()
        if first:
            show(report, arguments)
    if first and name is not None:  # The other processes do not wait for the upload.
        address = hub.upload(arguments.destination, name)
        if not (arguments.json or arguments.quiet):
            print(f"uploaded to {address}")
    return 0
