"""The state of a training on disk, written by orbax: complete or absent; only the last is kept."""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from prox24._checkpoints.tensors import writing
from prox24._checkpoints.unfinished import difference, intact
from prox24.errors import CheckpointError, DiskError, first_line
from prox24.refine import Training

UNREADABLE = "the state in {} cannot be read; delete it, or choose another folder"


class States(NamedTuple):
    """A folder of states."""

    manager: ocp.CheckpointManager
    job: Mapping[str, Any]  # all inputs that decide the result
    losses: list[float]  # so far

    def save(self, state: Training) -> None:
        """Writes a state; after the call the arrays may be overwritten."""
        arrays = (state.master, state.optimizer, state.best)
        about = {"job": self.job, "losses": state.losses}
        both = ocp.args.Composite(
            arrays=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about)
        )
        try:
            self.manager.save(state.steps, args=both)
            self.manager.wait_until_finished()
        except (OSError, ValueError) as error:  # tensorstore raises ValueError for a full disk
            raise DiskError(
                f"cannot write the state in {self.manager.directory}: {first_line(error)}"
            ) from error

    def resume(self, begun: Training) -> Training:
        """The last saved state, with the shapes and devices of `begun`; without one, `begun`."""
        step = self.manager.latest_step()
        if step is None:
            return begun
        arrays = (begun.master, begun.optimizer, begun.best)
        wanted = ocp.args.StandardRestore(jax.tree.map(_like, arrays))
        with intact(UNREADABLE.format(self.manager.directory)):
            saved = self.manager.restore(step, args=ocp.args.Composite(arrays=wanted))
            master, optimizer, best = saved["arrays"]
        return Training(master, optimizer, best, self.losses, step)


@contextlib.contextmanager
def states(folder: Path, job: Mapping[str, Any]) -> Iterator[States]:
    """Opens or makes a folder of states; raises CheckpointError for states of another job."""
    with writing(folder):  # Finds errors before there is a state to lose.
        folder.mkdir(parents=True, exist_ok=True)
        for own in folder.iterdir():
            if own.name.startswith(".") or own.name == "lost+found":  # of the file system
                continue
            # Each state is a folder by its step. An interrupted one has a longer name.
            if not own.name.partition(".")[0].isdecimal() or not own.is_dir():
                raise CheckpointError(
                    f"{folder} holds {own.name}, which is no state of a training: move it away, or "
                    "choose a new folder"
                )
        tempfile.TemporaryFile(dir=folder).close()
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder.absolute(), options=options) as manager:
        step, losses = manager.latest_step(), []
        if step is not None:
            with intact(UNREADABLE.format(manager.directory)):
                about = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))
                saved_job, losses = about["about"]["job"], list(about["about"]["losses"])
                found = difference(saved_job, json.loads(json.dumps(job)))
            if found is not None:
                raise CheckpointError(
                    f"{folder} holds the state of another training: {found}; "
                    "choose another folder, or delete it"
                )
        yield States(manager, job, losses)


def _like(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    # A sharding would bind an uncommitted count to one device.
    sharding = leaf.sharding if leaf.committed else None
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
