"""What is said under a table of its systems: how their replies came about, and which judges they were trained
to please."""

from collections.abc import Sequence
from pathlib import Path

import judges
import lineage
import storage
from lineage import Served
from markup import cell
from options import Paths
from systems import Named, System


def notes(
    lines: Sequence[Named], folders: dict[str, Path], among: Sequence[judges.Judge], paths: Paths
) -> list[str]:
    """How replies were decoded, what reading them has noted, and which runs were trained by what judges them:
    the training critics in `folders`, or one `among` the judges."""
    out = []
    critics = {k: storage.sha256(f / "model.safetensors") for k, f in folders.items()}
    for line in lines:
        for system in line.systems:
            name = cell(line.name if len(line.systems) == 1 else f"{line.name}, {system.name}")
            if system.decoding:
                out.append(f"Replies of {name}: {system.decoding}.")
            if system.notes:
                out.append(f"File of {name}: {cell('; '.join(system.notes))}.")
            pleased = [(critic.kind, critic.sha256) for critic in served_by(system, paths)]
            own = [kind for kind in critics if (kind, critics[kind]) in pleased]
            for judge in among:
                own += [f"{judge.name} {kind}" for kind, d in judge.sha256.items() if (kind, d) in pleased]
            if own:
                out.append(
                    f"{name} was trained against the very critics that judge it here, or on their labels: "
                    f"{', '.join(own)}."
                )
    return out


def served_by(system: System, paths: Paths) -> list[Served]:
    """The critics that a system was trained to please; none of anybody's file."""
    run = system.folder or system.run
    return lineage.served(run, paths) if run else []


def flattered(
    lines: Sequence[Named], among: Sequence[judges.Judge], paths: Paths
) -> dict[str, dict[str, list[str]]]:
    """For rendering.Page."""
    found: dict[str, dict[str, list[str]]] = {}
    for line in lines:
        critics = [critic for system in line.systems for critic in served_by(system, paths)]
        for judge in among:
            if kinds := lineage.shared(judge.halves, critics):
                found.setdefault(f"judge {judge.name}", {})[line.name] = kinds
    return found
