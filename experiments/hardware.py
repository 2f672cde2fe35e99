"""What is known of a device: peak rates, memory, links, watts, prices. Imports no JAX.

    facts = load("my.toml")
    facts.device("H100-80G-SXM (DGX-H100)").peak("bf16")      # 989e12
    facts.prices("h100-sxm")

The facts are in hardware.toml, each with its source and date; a user's file goes over them. What no
source gives is None here: nothing is guessed, and who needs it raises.
"""

import dataclasses
import re
import tomllib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

from experiments.facts_check import check_keys, checked, table
from experiments.upkeep import Energy, Fact, Reliability
from transformer.errors import RequestError, nearest

DTYPES = ("bf16", "fp16", "fp8", "int8", "tf32", "f32")
OPERATION_CLASSES = ("arithmetic", "function", "reduction", "dotted", "crossing", "scattered", "scattered_far")
"""What is computed beside products: `forecast/operations.py` says what belongs to each."""
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
PLATFORMS = ("gpu", "tpu", "cpu")
EFFICIENCIES = ("matmul", "memory", "link", "attention")

_SHARED_BY_A_CHIP: tuple[str, ...] = (
    "peak_flops_per_s", "measured_matmul_flops_per_s", "measured_bus_bytes_per_s", "hbm_bytes", "reserve_bytes",
    "hbm_bytes_per_s", "host_bytes_per_s", "link_bytes_per_s", "nic_bytes_per_s", "ici_bytes_per_s", "system_w", "tdp_w"
)  # fmt: skip
_COUNTED_IN_CHIPS = ("devices_per_node", "scaleup_devices", "pod_devices")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Facts of one device as its vendor sells it; None where no source gives one.

    Where `jax_devices_per_chip` is 2 (TPU v3, TPU v7) JAX makes two devices of this one:
    `per_jax_device()` is one of them. Peaks are dense; link and NIC bandwidths are one direction, per
    device. How collectives use links and latencies: `forecast/network.py`.
    """

    slug: str
    name: str
    platform: Literal["gpu", "tpu", "cpu"]
    compile_target: str  # slug of the device whose compiler target stands in; its own where it has one
    like: str | None = None  # priced as that device until it has a price
    year: int | None = None
    spellings: tuple[str, ...] = ()
    jax_kinds: tuple[str, ...] = ()  # what `device_kind` prints
    jax_devices_per_chip: int = 1

    peak_flops_per_s: Mapping[str, float] = field(default_factory=dict, hash=False)  # by dtype
    measured_matmul_flops_per_s: Mapping[str, float] = field(default_factory=dict, hash=False)  # fastest shape seen
    measured_products: Mapping[str, list] = field(default_factory=dict, hash=False, repr=False)  # m, n, k, batch, s
    measured_turned_products: Mapping[str, list] = field(default_factory=dict, hash=False, repr=False)  # `Product`
    operation_s: Mapping[str, float] = field(default_factory=dict, hash=False)  # an element, by class
    sustained_flops_per_s: float | None = None  # of large bf16 products, clocks settled; else of published/products.csv
    fresh_bytes_per_s: float | None = None  # at which memory is given that nothing has touched
    hbm_bytes: float | None = None
    reserve_bytes: float | None = None  # taken before the first array
    hbm_bytes_per_s: float | None = None
    host_bytes_per_s: float | None = None  # to the host's memory, one direction
    l2_bytes: float | None = None
    l2_bytes_per_s: float | None = None  # achieved
    sm_count: int | None = None  # processors that tiles of a product are dealt to
    clock_hz: float | None = None  # the highest
    launch_s: float | None = None  # least from one kernel to the next
    products_of: str | None = None  # whose measured products stand in, where its own were never measured

    devices_per_node: int | None = None
    scaleup_devices: int | None = None  # that share the fast switch
    link_bytes_per_s: float | None = None
    switch_reduces: bool = False  # the scale-up switch adds up and multiplies copies (NVLS)
    link_latency_s: float | None = None
    collective_launch_s: float | None = None
    measured_bus_bytes_per_s: Mapping[str, float] = field(default_factory=dict, hash=False)  # NCCL's, by collective
    nic_bytes_per_s: float | None = None
    nic_latency_s: float | None = None
    oversubscription: float = 1.0  # of the fabric above rail or leaf: 2.0 halves what leaves it

    ici_links: int | None = None
    ici_bytes_per_s: float | None = None  # per link
    torus_dims: int | None = None
    pod_devices: int | None = None

    tdp_w: float | None = None  # the limit of the board or package
    system_w: float | None = None  # at the wall with its share of the host, before cooling

    matmul_efficiency: float | None = None  # fractions of the published rate that large operations reach
    memory_efficiency: float | None = None
    link_efficiency: float | None = None
    attention_efficiency: float | None = None

    sources: Mapping[str, Fact] = field(default_factory=dict, hash=False, repr=False)

    def peak(self, dtype: str) -> float:
        """Dense FLOP/s (operations/s for int8) at `dtype`. RequestError where none is published."""
        if dtype not in self.peak_flops_per_s:
            known = ", ".join(sorted(self.peak_flops_per_s)) or "none"
            raise RequestError(f"no {dtype} peak is known for {self.slug!r} (known: {known}); give one with --facts")
        return self.peak_flops_per_s[dtype]

    @property
    def usable_bytes(self) -> int | None:
        """Memory for a program's arrays: all of it but for the runtime's reserve."""
        return None if self.hbm_bytes is None else int(self.hbm_bytes - (self.reserve_bytes or 0))

    def energy_j(self, seconds: float, n_devices: int) -> float | None:
        """Joules of so many devices for so long: at the measured system watts, else at the board's limit."""
        watts = self.system_w or self.tdp_w
        return None if watts is None else watts * seconds * n_devices

    def per_jax_device(self) -> "Device":
        """The device as JAX counts it: of a chip that JAX shows as two, half of every rate, byte and
        watt, and twice as many in a node; its sources say so."""
        parts = self.jax_devices_per_chip
        if parts == 1:
            return self
        factors = dict.fromkeys(_SHARED_BY_A_CHIP, 1 / parts) | dict.fromkeys(_COUNTED_IN_CHIPS, parts)
        sources = {key: fact for key, fact in self.sources.items() if key != "jax_devices_per_chip"}
        for key, fact in sources.items():
            if factor := factors.get(key.partition(".")[0]):
                note = "; ".join(filter(None, [fact.note, f"{fact.value:g} of a chip of {parts} devices"]))
                sources[key] = fact._replace(value=fact.value * factor, note=note)
        return dataclasses.replace(self, **_values(sources), jax_devices_per_chip=1, sources=sources)

    def compute_peak(self, precision: str) -> float | None:
        """Dense FLOP/s as XLA trains at `precision`, None where none is known: Volta's bf16 is float16, f32 is TF32."""
        names = {"bf16": ("bf16", "fp16"), "f32": ("tf32", "f32")}.get(precision, (precision,))
        return next((self.peak_flops_per_s[name] for name in names if name in self.peak_flops_per_s), None)

    def cited(self, *names: str) -> dict[str, dict[str, Any]]:
        """`{name: {"value", "source", "date"}}` for a record's `facts`, with "note" where there is one.

        A name is a field, an entry of a mapping ("peak_flops_per_s.bf16"), or a mapping: all that is known of it.
        """
        known = {f.name for f in dataclasses.fields(self)}
        if unknown := [name for name in names if name.partition(".")[0] not in known]:
            raise ValueError(f"not a fact of a device: {unknown[0]!r}, {nearest(unknown[0], known)}")
        return {
            key: {k: v for k, v in fact._asdict().items() if k != "note" or v is not None}
            for name in names
            for key, fact in self.sources.items()
            if key == name or key.startswith(f"{name}.")
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What one device as sold costs to rent, in USD an hour."""

    device: str
    cloud: str
    term: Literal["on_demand", "spot"]
    usd_per_device_h: float
    source: str
    date: str | None = None
    region: str | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All devices by slug, energy, what befalls a run, and prices."""

    devices: Mapping[str, Device]
    energy: Energy
    reliability: Reliability
    price_list: tuple[Price, ...]
    slugs: Mapping[str, str] = field(repr=False)  # of every spelling

    def device(self, name: str) -> Device:
        """The device of a slug or any spelling of it; text in brackets, case and punctuation do not
        count. RequestError names the nearest."""
        slug = self.slugs.get(_plain(name))
        if slug is None:
            raise RequestError(f"no facts about device {name!r}: {nearest(name.lower(), self.devices)}")
        return self.devices[slug]

    def by_jax_kind(self, kind: str) -> Device | None:
        """The device whose `device_kind` in JAX is `kind`; None where there is none."""
        return next((d for d in self.devices.values() if _plain(kind) in map(_plain, d.jax_kinds)), None)

    def prices(self, slug: str) -> list[Price]:
        """Known rents of a device, of both terms; those of the device that it is `like` if it has none."""
        device = self.device(slug)
        own = [price for price in self.price_list if price.device == device.slug]
        return own if own or device.like is None else self.prices(device.like)


def load(facts: str | Path | None = None) -> Facts:
    """The packaged facts, and over them those of the TOML file `facts`.

    The file has the packaged file's sections; a plain value has the file's name as its source. Its
    prices of a device and term replace the packaged ones. RequestError says what is wrong with it.
    """
    packaged = resources.files("experiments").joinpath("hardware.toml").read_text(encoding="utf-8")
    layers = [_read_layer(packaged, where="hardware.toml", known={}, sources={}, is_packaged=True)]
    if facts is not None:
        path = Path(facts)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"--facts={facts}: cannot be read ({error})") from None
        layers.append(_read_layer(text, where=path.name, known=layers[0].devices, sources=layers[0].sources))
    return _build(layers)


class _Layer(NamedTuple):
    """One file, checked: facts are Fact, keys of mappings are flat ("peak_flops_per_s.bf16")."""

    devices: dict[str, dict[str, Any]]
    efficiency: dict[str, dict[str, Fact]]
    single: dict[str, dict[str, Fact]]  # sections that are there once
    prices: list[Price]
    sources: dict[str, Fact]


_SINGLE = {"energy": Energy, "reliability": Reliability}
_SECTIONS = ("sources", "devices", "efficiency", *_SINGLE, "price")
_PLAIN = ("name", "platform", "compile_target", "like", "products_of", "spellings", "jax_kinds", "year")  # no source
_HINTS = {
    kind: {k: hint for k, hint in typing.get_type_hints(kind).items() if k not in ("slug", "sources")}
    for kind in (Device, *_SINGLE.values())
}
_BY_DTYPE = ("peak_flops_per_s", "measured_matmul_flops_per_s", "measured_products", "measured_turned_products")
_MAPPINGS = dict.fromkeys(_BY_DTYPE, DTYPES) | {
    "measured_bus_bytes_per_s": COLLECTIVES, "operation_s": OPERATION_CLASSES, "failures_per_device_day": PLATFORMS,
}  # fmt: skip
_NOT_COPIED = (
    "spellings", "jax_kinds", "operation_s", "fresh_bytes_per_s", "sustained_flops_per_s",
    *(name for name in _MAPPINGS if name.startswith("measured")),
)  # fmt: skip


def _plain(name: str) -> str:
    """A spelling reduced to what counts: "TPU v7 (Ironwood)" and "tpu-v7" are both "tpuv7"."""
    return re.sub(r"[^a-z0-9]", "", re.sub(r"\(.*?\)", "", name.casefold()))


def _read_layer(
    text: str, *, where: str, known: Iterable[str], sources: Mapping[str, Fact], is_packaged: bool = False
) -> _Layer:
    """Parse and check one file. `known`: slugs of the layers below."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RequestError(f"{where} is not TOML: {error}") from None
    check_keys(raw, _SECTIONS, where, "section")
    cites = dict(sources)
    for key, entry in table(raw.get("sources", {}), f"{where} [sources]").items():
        place = f"{where} [sources] {key}"
        check_keys(entry, ("cite", "date"), place)
        date = checked(entry["date"], str, f"{place} date") if "date" in entry else None
        cites[key] = Fact(None, checked(entry.get("cite"), str, f"{place} cite"), date)
    reader = _Reader(where=where, sources=cites, is_packaged=is_packaged)

    devices: dict[str, dict[str, Any]] = {}
    for slug, entry in table(raw.get("devices", {}), f"{where} [devices]").items():
        devices[slug] = reader.device(slug, entry, known={*known, *devices})
    efficiency_raw = table(raw.get("efficiency", {}), f"{where} [efficiency]")
    check_keys(efficiency_raw, PLATFORMS, f"{where} [efficiency]")
    efficiency = {
        platform: reader.facts(entry, dict.fromkeys(EFFICIENCIES, float), f"{where} [efficiency.{platform}]")
        for platform, entry in efficiency_raw.items()
    }
    single = {k: reader.facts(raw.get(k, {}), _HINTS[kind], f"{where} [{k}]") for k, kind in _SINGLE.items()}
    rows = checked(raw.get("price", []), list, f"{where} [[price]]")
    prices = [reader.price(row, f"{where} [[price]] number {n}") for n, row in enumerate(rows, start=1)]
    return _Layer(devices, efficiency, single, prices, cites)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    """Checks the entries of one file."""

    where: str
    sources: Mapping[str, Fact]
    is_packaged: bool

    def device(self, slug: str, entry: Any, *, known: set[str]) -> dict[str, Any]:
        place = f"{self.where} [devices.{slug}]"
        check_keys(entry, _HINTS[Device], place)
        texts = {k: checked(v, _HINTS[Device][k], f"{place} {k}") for k, v in entry.items() if k in _PLAIN}
        if slug in known and "like" in texts:
            raise RequestError(f"{place}: {slug!r} is known already: leave out `like`, or use a new name")
        if "like" in texts and texts["like"] not in known:
            raise RequestError(f"{place} like = {texts['like']!r}: no such device, {nearest(texts['like'], known)}")
        missing = [k for k in ("name", "platform", "compile_target") if k not in texts]
        if missing and slug not in known and "like" not in texts:
            raise RequestError(
                f'{place}: a new device needs {", ".join(missing)}, or like = "h100-sxm"; {nearest(slug, known)}'
            )
        numbers = {k: v for k, v in entry.items() if k not in _PLAIN}
        return texts | self.facts(numbers, _HINTS[Device], place)

    def facts(self, entry: Any, hints: Mapping[str, Any], place: str) -> dict[str, Fact]:
        """The facts of a table, flat."""
        check_keys(entry, hints, place)
        facts: dict[str, Fact] = {}
        for name, given in entry.items():
            if name in _MAPPINGS:
                check_keys(given, _MAPPINGS[name], f"{place} {name}")
                kind = typing.get_args(hints[name])[1]
                facts |= {f"{name}.{k}": self.fact(v, kind, f"{place} {name}.{k}") for k, v in given.items()}
            else:
                facts[name] = self.fact(given, hints[name], f"{place} {name}")
        return facts

    def fact(self, given: Any, hint: Any, place: str) -> Fact:
        check_keys(entry := given if isinstance(given, dict) else {"value": given}, ("value", "source", "note"), place)
        assert "source" in entry or not self.is_packaged, f"{place} has no source"
        note = checked(entry["note"], str, f"{place} note") if "note" in entry else None
        return Fact(checked(entry.get("value"), hint, place), *self.cite(entry, place), note)

    def cite(self, entry: Mapping[str, Any], place: str) -> tuple[str, str | None]:
        """Source and date: of the key of [sources], or the text as it stands, or this file's name."""
        source = checked(entry.get("source", self.where), str, f"{place} source")
        assert source in self.sources or not self.is_packaged, f"{place}: {source!r} is not in [sources]"
        return (self.sources[source].source, self.sources[source].date) if source in self.sources else (source, None)

    def price(self, row: Any, place: str) -> Price:
        hints = typing.get_type_hints(Price)
        check_keys(row, hints, place)
        if missing := [k for k in ("device", "usd_per_device_h") if k not in row]:
            raise RequestError(f"{place}: needs {missing[0]}")
        source, date = self.cite(row, place)
        row = {"cloud": self.where, "term": "on_demand", "date": date} | row | {"source": source}
        return Price(**{k: checked(v, hints[k], f"{place} {k}") for k, v in row.items() if v is not None})


def _build(layers: list[_Layer]) -> Facts:
    merged: dict[str, dict[str, Any]] = {}
    efficiency: dict[str, dict[str, Fact]] = {}
    single: dict[str, dict[str, Fact]] = {name: {} for name in _SINGLE}
    for layer in layers:
        for slug, given in layer.devices.items():
            copied = merged.get(given.get("like", slug), {})
            if "like" in given:
                copied = {k: v for k, v in copied.items() if k.partition(".")[0] not in _NOT_COPIED} | {"name": slug}
            merged[slug] = copied | given
        for platform, given in layer.efficiency.items():
            efficiency[platform] = efficiency.get(platform, {}) | given
        single = {name: known | layer.single[name] for name, known in single.items()}
    for slug, given in merged.items():
        if (target := given["compile_target"]) not in merged:
            raise RequestError(f"compile_target = {target!r} of device {slug!r}: {nearest(target, merged)}")
    devices = {slug: _device(slug, given, efficiency[given["platform"]]) for slug, given in merged.items()}
    slugs = _slugs(devices.values())
    built: dict[str, Any] = {k: kind(**_values(single[k]), sources=single[k]) for k, kind in _SINGLE.items()}
    facts = Facts(devices=devices, price_list=(), slugs=slugs, **built)
    return dataclasses.replace(facts, price_list=_prices(facts, layers))


def _device(slug: str, given: Mapping[str, Any], efficiency: Mapping[str, Fact]) -> Device:
    """A Device of a merged entry, with the efficiencies of its platform where it has none of its own."""
    given = {f"{name}_efficiency": fact for name, fact in efficiency.items()} | dict(given)
    sources = {name: value for name, value in given.items() if isinstance(value, Fact)}
    texts = {name: value for name, value in given.items() if not isinstance(value, Fact)}
    return Device(slug=slug, **texts, **_values(sources), sources=sources)


def _values(sources: Mapping[str, Fact]) -> dict[str, Any]:
    """The values of flat facts, "peak_flops_per_s.bf16" back in its mapping."""
    values: dict[str, Any] = {}
    for key, fact in sources.items():
        name, _, entry = key.partition(".")
        if entry:
            values.setdefault(name, {})[entry] = fact.value
        else:
            values[name] = fact.value
    return values


def _slugs(devices: Iterable[Device]) -> dict[str, str]:
    """Slug by plain spelling. RequestError where two devices share one."""
    slugs: dict[str, str] = {}
    for device in devices:
        for spelling in (device.slug, *device.spellings, *device.jax_kinds):
            if (owner := slugs.setdefault(_plain(spelling), device.slug)) != device.slug:
                raise RequestError(f"spelling {spelling!r} of device {device.slug!r} is one of {owner!r} already")
    return slugs


def _prices(facts: Facts, layers: list[_Layer]) -> tuple[Price, ...]:
    """Prices under their slugs; those of a layer replace the ones below of the same device and term."""
    prices: list[Price] = []
    for layer in layers:
        given = [dataclasses.replace(price, device=facts.device(price.device).slug) for price in layer.prices]
        replaced = {(price.device, price.term) for price in given}
        prices = [price for price in prices if (price.device, price.term) not in replaced] + given
    return tuple(prices)
