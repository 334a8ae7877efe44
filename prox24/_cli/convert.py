"""`prox24 convert`: writes a checkpoint in another format, dtype or size of shards."""

import argparse
from pathlib import Path

from prox24._cli import options


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", help=options.MODEL)
    command.add_argument("destination", type=Path, help="HF folder to write")
    command.add_argument(
        "--format",
        choices=("safetensors", "flax"),
        default="safetensors",
        help="safetensors, or the files of transformers' Flax classes (default: safetensors)",
    )
    command.add_argument(
        "--dtype", choices=options.DTYPES, help="of the output (default: the source's)"
    )
    options.add_writing(command)
    options.add_output(command, quiet="no summary")


def run(arguments: argparse.Namespace) -> int:
    from prox24._checkpoints.checkpoint import open_checkpoint
    from prox24._checkpoints.writer import OUTPUTS, check_destination, write_checkpoint
    from prox24._jobs.output import print_json, table

    check_destination(arguments.destination, [Path(arguments.source)], arguments.overwrite)
    checkpoint = open_checkpoint(arguments.source)
    written = write_checkpoint(
        checkpoint,
        arguments.destination,
        dtype=arguments.dtype,
        overwrite=arguments.overwrite,
        max_shard_bytes=arguments.shard_size,
        file_format=arguments.format,
    )
    names = set(written)
    remark = OUTPUTS[arguments.format](checkpoint).remark
    left_out = [name for name in checkpoint.tensors if name not in names]
    if arguments.json:
        print_json(
            {
                "source": str(arguments.source),
                "destination": str(arguments.destination),
                "format": arguments.format,
                "tensors": len(written),
                "left_out": left_out,
                "remark": remark,
            }
        )
    elif not arguments.quiet:
        rows = [["format", arguments.format], ["tensors", str(len(written))]]
        if left_out:
            others = ", ..." if len(left_out) > 1 else ""
            rows.append(["buffers left out", f"{len(left_out)}: {left_out[0]}{others}"])
        print(table(["written", str(arguments.destination)], rows))
        print(remark)
    return 0
