"""What a run was trained with, as far as a table must say so: the critics that served it, the pairs that
these have seen, and its exemplars."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import advice
import runs
import storage
from options import DIMENSIONS, Paths

#: of the seeker posts that a critic has learnt from (corpora.choose_pairs): a half, or both
ALL, UNKNOWN = "all", "unknown"
#: the entry of a result.json that says which critics a run was trained to please
SERVED = "served"
#: the input of a critic of one half that says which posts it is made of; earlier halves were cut otherwise
POSTS = "posts"
OTHER = {"a": "b", "b": "a"}


@dataclass(frozen=True)
class Served:
    """A critic that a run was trained to please, as a loss, as a reward, or by its labels."""

    kind: str
    sha256: str
    half: str  # a, b, all, or unknown where the critic is no longer there


def home(run: Path, paths: Paths) -> Paths:
    """The workdir that a run's notes are seen from: its own, where what they name lies there; else the one in
    use."""
    own = Paths(advice.workdir_of(Path(run).absolute()))
    named = runs.sources(run, own).values()
    return own if any(source.path.exists() for source in named) else paths


def half_of(critic: Path, paths: Paths, digest: str | None = None) -> str:
    """The half of the seeker posts that a critic's run has learnt from, itself or by the critics that it
    began from or was taught by; unknown where one of these is not there, or not the one of this sha256, or
    does not say of which posts its half is made."""
    weights, flags = critic / "model.safetensors", critic / "args.json"
    if not weights.exists() or not flags.exists() or (digest and storage.checksum(weights) != digest):
        return UNKNOWN
    made_with = storage.read_json(flags)
    part = made_with.get("args", {}).get("part", ALL)
    halves = {part if part == ALL or POSTS in made_with.get("inputs", {}) else UNKNOWN}
    paths = home(critic, paths)
    places = runs.sources(critic, paths)
    for name, place in places.items():
        if name.split()[0] in ("init", "teacher"):
            halves.add(half_of(place.path, paths, place.sha256))
    if len(halves) == 1:
        return halves.pop()
    return UNKNOWN if UNKNOWN in halves and ALL not in halves else ALL


def served(run: Path, paths: Paths) -> list[Served]:
    """The critics in the losses and rewards of a run, those of the labels that it was led by, and all of the
    run that it began from; unknown ones where that is gone or does not say. A finished run has noted them."""
    noted = storage.read_if_there(run / "result.json").get(SERVED)
    if noted is not None:
        return [Served(**critic) for critic in noted]
    if not (run / "args.json").exists():
        return nobody_knows()
    paths = home(run, paths)
    places, made_with = runs.sources(run, paths), storage.read_json(run / "args.json")
    found = []
    for name, digest in made_with.get("inputs", {}).items():
        how, _, kind = name.partition(" ")
        if how in ("critic", "reward"):
            half = half_of(places[name].path, paths, digest) if name in places else UNKNOWN
            found.append(Served(kind, digest, half))
    if "labels train" in places:
        led = set(DIMENSIONS) if made_with.get("args", {}).get("control") else {c.kind for c in found}
        by = labelled_by(places["labels train"], paths)
        found += [critic for critic in by if critic.kind in led and critic not in found]
    start = places.get("init")
    if start:
        there = start.path.exists() and storage.is_still(start.path, start.sha256)
        found += served(start.path, paths) if there else nobody_knows()
    return found


def nobody_knows() -> list[Served]:
    return [Served(kind, "", UNKNOWN) for kind in DIMENSIONS]


def labelled_by(labels: runs.Source, paths: Paths) -> list[Served]:
    """The critics that made a file of labels, by the note beside it; unknown ones where that is not there, or
    of another file."""
    there = labels.path.exists() and storage.checksum(labels.path) == labels.sha256
    noted = storage.read_origin(labels.path) if there else {}
    found = []
    for kind in DIMENSIONS:
        by = noted.get(kind, {})
        half = half_of(paths.find(by["critic"]), paths, by["sha256"]) if by else UNKNOWN
        found.append(Served(kind, by.get("sha256", ""), half))
    return found


def other_half(critics: Iterable[Served]) -> str:
    """The half of which none of these critics has seen anything; all where there is no such half, or no
    critic."""
    halves = {critic.half for critic in critics if critic.kind in DIMENSIONS}
    return OTHER.get(halves.pop(), ALL) if len(halves) == 1 else ALL


def shared(halves: Mapping[str, str], critics: Iterable[Served]) -> list[str]:
    """Of a judge that has learnt each dimension from a half {dim: half}: the critics that have learnt from
    some of the same pairs, or may have."""
    unknown = " (its pairs are unknown, as those of critics that earlier code made)"
    found = {}
    for critic in critics:
        if critic.kind in halves and {halves[critic.kind], critic.half} != {"a", "b"}:
            found[critic.kind] = critic.kind + unknown * (critic.half == UNKNOWN)
    return list(found.values())


def exemplars_of(origin: Mapping, run: Path | None, split: str, paths: Paths) -> Path | None:
    """The file of the exemplars that replies to a split were written with; None where there were none.

    `origin`: the note beside the replies; it names the file, or else the run does whose replies they are.
    """
    own = home(run, paths) if run else paths
    if isinstance(noted := origin.get("exemplars"), dict):
        # noted as seen from the workdir in which the replies were written: this one, or the run's
        seen = [place.find(noted["path"]) for place in (own, paths)]
        digest = noted.get("sha256")
        return next((f for f in seen if f.exists() and digest in (None, storage.sha256(f))), seen[0])
    trained = runs.sources(run, own).get("exemplars train") if run else None
    return trained.path.with_name(paths.exemplars(split).name) if trained else None
