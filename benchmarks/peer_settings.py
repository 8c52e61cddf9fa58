"""The peers' fastest settings by kind of processor, as ``python -m benchmarks.step --search`` found and recorded them.

This module must not import the peers, nor try anything.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import common

PATH = Path(__file__).with_suffix(".json")


@dataclasses.dataclass(frozen=True)
class Record:
    """The outcome of one search.

    Attributes:
        date: when.
        step: what was tried: the model, its images, the batch, threads.
        versions: of torch and the peers.
        settings: attention and optimizer, by "peer, format".
    """

    date: str
    step: str
    versions: Mapping[str, str]
    settings: Mapping[str, Sequence[str]]


def read() -> dict[str, Record]:
    """Returns the records by kind of processor."""
    return {kind: Record(**x) for kind, x in json.loads(PATH.read_text(encoding="utf-8")).items()}


def write(kind: str, record: Record) -> None:
    """Records a search; what an earlier one found with the same versions, and this one did not try, stays."""
    records = read()
    if kind in records and records[kind].versions == record.versions:
        record = dataclasses.replace(record, settings={**records[kind].settings, **record.settings})
    records[kind] = record
    text = json.dumps({kind: dataclasses.asdict(x) for kind, x in records.items()}, indent=2)
    PATH.write_text(text + "\n", encoding="utf-8")


def find(kind: str) -> tuple[Record, str]:
    """Returns the record for a kind of processor, or another's, and a sentence that says which it is."""
    records = read()
    whose = kind if kind in records else next(iter(records))
    record = records[whose]
    other = [f"on {whose}"] * (whose != kind)
    for package, version in record.versions.items():
        if common.installed(package) and common.version(package) != version:
            other.append(f"with {package} {version}")
    where = "on this kind of processor, with these versions"
    if other:
        where = f"{', '.join(other)}. Here others may be faster: --search tries them (ten minutes and more)"
    return record, f"Peers' settings: found on {record.date} for {record.step}, {where}"
