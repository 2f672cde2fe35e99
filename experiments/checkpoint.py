"""What a run keeps between starts: its state as plain trees, where its data stood, what it was asked.

DIR/config.json          the request; another one is refused
DIR/checkpoints/STEP/    state (arrays, each process its own shards) and data (where the input stood)
"""

import json
from pathlib import Path
from typing import Any

import jax

from experiments.records import Record, write_whole
from experiments.step import TrainState
from transformer.errors import RequestError

FREE_TO_CHANGE = (
    "out", "json", "layout", "devices", "facts", "micro_batch_seqs", "remat", "offload_optimizer", "checkpoint_every",
    "validate_every", "sample_tokens",
)  # fmt: skip
"""Flags that change no number that is learnt: a run may resume with others."""


class Checkpoints:
    """The checkpoints of one folder, the newest two kept. Writing goes on in the background."""

    def __init__(self, folder: Path) -> None:
        import orbax.checkpoint as ocp  # takes seconds, and most verbs need it not

        self._ocp = ocp
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        handlers = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(
            (folder / "checkpoints").absolute(), options=options, item_handlers=handlers
        )

    @property
    def latest(self) -> int | None:
        """The newest finished step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, data: Record) -> None:
        """Begin to write; returns when the arrays may be overwritten."""
        args = self._ocp.args
        self._manager.save(
            step, args=args.Composite(state=args.StandardSave(state._asdict()), data=args.JsonSave(data))
        )

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, Record]:
        """The state as saved, placed as `like` says, so the layout may be another. RequestError if of another model."""
        self._check(step, like)
        args = self._ocp.args
        found: Any = self._manager.restore(
            step, args=args.Composite(state=args.StandardRestore(like._asdict()), data=args.JsonRestore())
        )
        return TrainState(**found.state), found.data

    def _check(self, step: int, like: TrainState) -> None:
        """RequestError for the first parameter that only one of the two has, or whose shapes differ."""
        saved, ours = _shapes(self._manager.item_metadata(step).state.tree["params"]), _shapes(like.params)
        for name in sorted(saved.keys() | ours.keys()):
            if saved.get(name) != ours.get(name):
                there, here = (shapes.get(name, "missing") for shapes in (saved, ours))
                raise RequestError(
                    f"the checkpoint of step {step} in {self._manager.directory} is not of this model: "
                    f"{name} is {there} there and {here} here; choose another --out"
                )

    def close(self) -> None:
        """Wait until all that was begun is written."""
        self._manager.wait_until_finished()
        self._manager.close()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of a tree's arrays, or of what stands for them, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}


def claim(folder: Path, config: dict[str, Any], *, write: bool) -> None:
    """Make `folder` this run's, or check that it is. RequestError names the first flag that differs.

    `write` is true in the one process that writes.
    """
    path = folder / "config.json"
    flat = config | {f"model.{k}": v for k, v in config["model"].items()}
    mine = {k: v for k, v in flat.items() if k not in (*FREE_TO_CHANGE, "model")}
    if path.exists():
        try:
            theirs = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise RequestError(f"{path}: not a run's config ({error}): choose another --out") from None
        newer = {k for k in mine.keys() - theirs.keys() if not k.startswith("model.")}  # flags that it did not know
        for key in sorted((mine.keys() | theirs.keys()) - newer):
            if mine.get(key) != theirs.get(key):
                asked, theirs_was = (f"{c[key]}" if key in c else "its default" for c in (mine, theirs))
                raise RequestError(
                    f"--{key}={asked}: the run in {folder} was started with {theirs_was}; "
                    "give that, or choose another --out"
                )
    elif write:
        write_whole(path, json.dumps(mine, indent=2, sort_keys=True) + "\n")
