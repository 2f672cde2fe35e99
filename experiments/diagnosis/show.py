"""The explanation as a person reads it: the largest of everything, totals, and all that is surprising."""

import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from experiments.diagnosis.collectives import Collective
from experiments.diagnosis.compiler import Rematerialization
from experiments.diagnosis.placed import Placed, Replicated, Rule
from experiments.diagnosis.source import Origin

TOP = 12
"""Rows of a table; `--json` has all."""


def console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 136, highlight=False)


def before(
    out: Console, params: Sequence[Placed], constrained: Sequence[Placed], rules: Sequence[Rule],
    copies: Sequence[Replicated],
) -> None:  # fmt: skip
    """What is known before the compiler has spoken."""
    out.print(_parameters(params))
    out.print(_activations([p for p in constrained if p.dims]))
    out.print(_rules(rules))
    if copies:
        out.print(_copies(copies))
    for by_hand in (p for p in constrained if not p.dims):
        out.print(
            f"[yellow]Placed by hand[/], by no rule: {by_hand.dtype}{list(by_hand.shape)} in {escape(by_hand.name)} "
            f"at {escape(by_hand.origin.where)}: use `shard.activation` with its dims", soft_wrap=True,
        )  # fmt: skip


def after(
    out: Console, sent: Sequence[Collective], warned: Sequence[Rematerialization], memory_bytes: Mapping[str, int]
) -> None:
    """What the compiler made of it."""
    if memory_bytes:
        by_class = ", ".join(f"{name} {_bytes(n)}" for name, n in memory_bytes.items() if name != "total")
        out.print(f"[bold]Compiled[/]: {_bytes(memory_bytes['total'])} on a device: {by_class}\n")
    if sent:
        out.print(_collectives(sent))
        out.print(_by_axis(sent))
    surprising = [c for c in sent if c.surprise]
    if surprising:
        share = sum(c.step_bytes for c in surprising) / sum(c.step_bytes for c in sent)
        table = _table(f"Surprising: {len(surprising)} collectives, {share:.1%} of all bytes", style="yellow")
        _columns(table, "what", ">a step", "module", "-where", "why, and what to do")
        for c in surprising[:TOP]:
            why = Text.assemble((f"{c.surprise}: ", "bold"), c.hint)
            table.add_row(
                f"{c.axis} {c.kind}\n{c.tensor}", _bytes(c.step_bytes), _module(c.origin), _where(c.origin), why
            )
        _more(table, [c.step_bytes for c in surprising])
        out.print(table)
    if warned:
        table = _table(f"Gathered whole, involuntarily: {sum(w.times for w in warned)} times", style="red")
        _columns(table, "tensor", ">whole", ">times", "module", "where", "what to do")
        for w in warned:
            dims = " x ".join(w.origin.dims)
            table.add_row(
                f"{w.tensor}\n{dims}",
                _bytes(w.n_bytes),
                str(w.times),
                _module(w.origin),
                _where(w.origin),
                escape(w.hint),
            )
        out.print(table)
    if memory_bytes and not surprising and not warned:
        out.print("[green]Nothing surprising[/]: the layout's rules explain every collective.")


def split(placed: Placed) -> Text:
    """ "32 layers x 4096/fsdp embed x 14336/tensor ffn"."""
    text = Text()
    for size, dim, axes in zip(placed.shape, placed.named_dims, placed.axes, strict=True):
        used = [axis for axis in axes if getattr(placed.layout, axis) > 1]
        text.append(" x " if text else "", "dim").append(str(size))
        text.append("/" + "·".join(used) if used else "", "cyan").append(f" {dim}", "dim")
    return text


def _parameters(params: Sequence[Placed]) -> Table:
    whole = sum(p.state_bytes for p in params)
    table = _table(f"Parameters: {len(params)}, with what the optimizer keeps {_bytes(whole)} on a device")
    _columns(table, "parameter", "dims, and the axes that split them", ">bytes", ">+ optimizer", "copies over")
    for p in params[:TOP]:
        table.add_row(
            escape(p.name), split(p), _bytes(p.n_bytes), _bytes(p.state_bytes - p.n_bytes), _axes(p.replicated)
        )
    _more(table, [p.n_bytes for p in params])
    return table


def _activations(constrained: Sequence[Placed]) -> Table:
    table = _table("Largest tensors that a rule places, on a device: activations, and weights as they are used")
    _columns(table, "module", "dims, and the axes that split them", "type", ">bytes", "copies over", "-where")
    for p in constrained[:TOP]:
        table.add_row(_tail(p.name), split(p), p.dtype, _bytes(p.n_bytes), _axes(p.replicated), _where(p.origin))
    _more(table, [p.n_bytes for p in constrained], says_bytes=False)
    return table


def _rules(rules: Sequence[Rule]) -> Table:
    table = _table("Rules, and what they did; what would not divide is refused")
    _columns(table, "dim", "stored over", "", "computed over", "")
    for dim in dict.fromkeys(rule.dim for rule in rules):
        cells: list[Text | str] = []
        for name in ("parameters", "activations"):
            rule = next((r for r in rules if (r.table, r.dim) == (name, dim)), None)
            cells += ["", ""] if rule is None else [Text(" ".join(rule.axes), "cyan"), _outcome(rule)]
        table.add_row(dim, *cells)
    return table


def _outcome(rule: Rule) -> Text:
    works = rule.n_tensors > 0 and rule.parts > 1
    return Text(f"{rule.n_tensors} tensors {rule.outcome}" if works else rule.outcome, "" if works else "dim")


def _copies(copies: Sequence[Replicated]) -> Table:
    table = _table("Copies: what devices along these axes hold in common (parameters with their optimizer state)")
    _columns(table, "over", ">copies", ">on a device", ">split, would save", ">tensors", "largest")
    for r in copies[:TOP]:
        table.add_row(
            _axes(r.axes), f"{r.copies:,}", _bytes(r.n_bytes), _bytes(r.cost_bytes), str(len(r.names)),
            escape(", ".join(r.names[:3])),
        )  # fmt: skip
    return table


def _collectives(sent: Sequence[Collective]) -> Table:
    table = _table("Largest collectives of a step; bytes are of a device's whole array")
    _columns(table, "axis", "kind", "-tensor", ">each", ">times", ">a step", "module", "-where")
    for c in sent[:TOP]:
        table.add_row(
            _axes(c.axis.split("_")), c.kind, c.tensor, _bytes(c.n_bytes), f"{c.times:,}", _bytes(c.step_bytes),
            _module(c.origin), _where(c.origin), style="yellow" if c.surprise else "",
        )  # fmt: skip
    _more(table, [c.step_bytes for c in sent], column=5)
    return table


def _by_axis(sent: Sequence[Collective]) -> Table:
    sums: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for c in sent:
        sums[c.axis, c.kind, "" if c.surprise else c.hint].append(c.step_bytes)
    table = _table("In all, and what for")
    _columns(table, "axis", "kind", ">places", ">a step", "what for")
    for (axis, kind, hint), found in sorted(sums.items(), key=lambda item: -sum(item[1])):
        why = escape(hint) if hint else Text("surprising: below", "yellow")
        table.add_row(_axes(axis.split("_")), kind, str(len(found)), _bytes(sum(found)), why)
    return table


def _table(title: str, style: str = "bold") -> Table:
    return Table(title=title, title_justify="left", title_style=style, box=box.SIMPLE_HEAD, pad_edge=False)


def _columns(table: Table, *names: str) -> None:
    """Those with a ">" in front are numbers; they and those with a "-" stay on one line."""
    for name in names:
        table.add_column(
            name.lstrip(">-"), justify="right" if name[:1] == ">" else "left", no_wrap=name[:1] in (">", "-"),
            overflow="fold",
        )  # fmt: skip


def _more(table: Table, sizes: Sequence[int], *, column: int = 2, says_bytes: bool = True) -> None:
    """The last row: how many are not shown, and what they add up to."""
    rest = sizes[TOP:]
    if rest:
        cells = [""] * len(table.columns)
        cells[0] = f"and {len(rest):,} more"
        if says_bytes and column < len(cells):
            cells[column] = _bytes(sum(rest))
        table.add_row(*cells, style="dim")


def _module(origin: Origin) -> str:
    return (_tail(origin.module) or "?") + ("" if origin.phase == "forward" else f", {origin.phase}")


def _tail(path: str) -> str:
    """The innermost modules of a path."""
    return escape("/".join(path.split("/")[-2:]))


def _where(origin: Origin) -> str:
    return escape(origin.where.replace("transformer/", "").replace("experiments/", "") or "?")


def _axes(axes: Iterable[str]) -> Text:
    return Text("·".join(axes), "cyan")


def _bytes(n: float) -> str:
    """Three digits and a unit.

    >>> [_bytes(n) for n in (0, 999, 1_500, 262_668_288, 8.3e9, 2.5e14)]
    ['0 B', '999 B', '1.5 kB', '263 MB', '8.3 GB', '250 TB']
    """
    for unit in ("B", "kB", "MB", "GB"):
        if n < 999.5:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:,.3g} TB"
