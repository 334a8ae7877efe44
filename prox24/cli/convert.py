"""`prox24 convert`: a checkpoint from one format, dtype or size of shards into another."""

import argparse

from prox24.checkpoints.checkpoint import open_checkpoint
from prox24.checkpoints.writer import OUTPUTS, check_destination, write_checkpoint
from prox24.cli.output import print_json, print_table


def run(arguments: argparse.Namespace) -> int:
    """Carries the command out; the exit code."""
    check_destination(arguments.destination, [arguments.source], arguments.overwrite)
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
        print_table(["written", str(arguments.destination)], rows)
        print(remark)
    return 0
