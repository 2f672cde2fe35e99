"""The texts that mean most nearly the same as a query, by the embeddings of a trained encoder.

    python -m experiments.train --preset=bert-base --model.n_layers=4 ... --dataset=web --out=runs/encoder
    python -m experiments.retrieve runs/encoder --query="the light shines in the darkness" --dataset=web

Lines of the held-out split are embedded, each as the mean of its last layer's vectors, and ranked by the cosine
of the angle to the query's. Seconds for a small model on two cores.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.table import Table

from experiments import attached, data, entry
from experiments.checkpoint import Checkpoints
from experiments.config import RunConfig, train_step
from experiments.entry import flag, positional
from experiments.sources import open_source
from transformer.errors import RequestError
from transformer.models import Transformer, apply, pooled

BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Request:
    """`python -m experiments.retrieve`"""

    folder: str = positional("the folder of a run of experiments.train")
    query: str = flag("", "what to look for")
    dataset: str | None = flag(None, "where to look: as in experiments.train; default: what it was trained on")
    top: int = flag(5, "how many texts")
    json: bool = flag(False, "print the table as JSON on standard output")

    def __post_init__(self) -> None:
        if not self.query.strip():
            raise RequestError("--query is empty: expected a text to look for")
        if self.top < 1:
            raise RequestError(f"--top={self.top}: expected at least 1")


def main(request: Request) -> int:
    attached.look_for_what_is_there()
    run, params, trained_on = learnt(Path(request.folder))
    if run.objective == "pairs":
        raise RequestError(f"{request.folder} holds an encoder_decoder; expected an encoder, or a decoder")
    dataset = request.dataset or trained_on
    texts = list(dict.fromkeys(_lines(dataset)))
    if not texts:
        raise RequestError(f"--dataset={dataset}: its held-out split has no lines")
    vectors = embeddings(Transformer(run.resolved_model), params, [request.query, *texts], run.length)
    similarity = vectors[1:] @ vectors[0]
    best = np.argsort(-similarity, kind="stable")[: request.top]
    rows = [{"similarity": float(similarity[i]), "text": texts[i]} for i in best]
    print(f"{len(texts):,} lines of the held-out split of {dataset}", file=sys.stderr)
    if request.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return 0
    table = Table(title=request.query, title_justify="left")
    table.add_column("cosine", justify="right")
    table.add_column("text")
    for row in rows:
        table.add_row(f"{row['similarity']:.4f}", row["text"])
    Console(width=None if sys.stdout.isatty() else 120, markup=False).print(table)
    return 0


def learnt(folder: Path) -> tuple[RunConfig, Any, str]:
    """What a run of experiments.train was asked, its newest parameters on the host, and the dataset that it read."""
    path = folder / "config.json"
    if not path.is_file():
        raise RequestError(f"no run in {str(folder)!r}: expected the --out of experiments.train")
    try:
        saved = dict(json.loads(path.read_text(encoding="utf-8")))
        preset, seq_len, dataset = (saved[key] for key in ("preset", "seq_len", "dataset"))
    except (ValueError, TypeError, KeyError) as error:
        raise RequestError(f"{path}: not a run's config ({error}): expected the --out of experiments.train") from None
    model = {key.removeprefix("model."): value for key, value in saved.items() if key.startswith("model.")}
    run = RunConfig(preset=preset, model=model, seq_len=seq_len)
    step = train_step(run, run.rung(1), jax.devices())
    checkpoints = Checkpoints(folder)
    try:
        if checkpoints.latest is None:
            raise RequestError(f"{folder} has no finished checkpoint yet: wait for one, or lower --checkpoint_every")
        state, _ = checkpoints.restore(checkpoints.latest, step.abstract_state)
    finally:
        checkpoints.close()
    return run, jax.device_get(state.params), dataset


def embeddings(model: Transformer, params: Any, texts: Sequence[str], length: int) -> Float[np.ndarray, "n D"]:
    """A vector of length 1 for each text, of which `length` tokens are read."""

    @jax.jit
    def embed(params: Any, tokens: jax.Array) -> jax.Array:
        segments = (tokens != data.PAD).astype(jnp.int32)
        return pooled(apply(model, params, {"inputs": tokens, "segments": segments}).x, segments.astype(jnp.float32))

    rows = np.full((-(-len(texts) // BATCH) * BATCH, length), data.PAD, np.int32)
    for row, text in zip(rows, texts, strict=False):
        ids = data.encode(text)[:length]
        row[: len(ids)] = ids
    found = [np.asarray(embed(params, jnp.asarray(part))) for part in np.split(rows, len(rows) // BATCH)]
    return np.concatenate(found)[: len(texts)]


def _lines(dataset: str) -> Iterator[str]:
    for document in open_source(dataset, data.default_cache()).documents("validation"):
        yield from filter(None, (line.strip() for line in document.decode(errors="replace").splitlines()))


if __name__ == "__main__":
    entry.start(main, Request)
