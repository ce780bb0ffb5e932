"""Zoos from checkpoints that other people trained.

Checkpoints are read one at a time, in an order that depends on their names only, and written shard
by shard. A checkpoint that cannot be used is skipped and listed with the reason. The new zoo's
`import.json` says which names were mapped, which buffers dropped or kept, which numbers converted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from flown.base.config import read_mapping
from flown.base.errors import FlownError, unknown
from flown.nets.architecture import Architecture
from flown.tasks.task import Task
from flown.zoo.imports import matrix, modelzoos, statefiles
from flown.zoo.imports.discover import Found, Skipped, compile_pattern, discover
from flown.zoo.imports.job import Import
from flown.zoo.imports.naming import PREFIXES, Naming
from flown.zoo.store import Zoo

__all__ = ["Skipped", "from_checkpoints", "from_matrix", "from_modelzoos"]


def from_checkpoints(
    path: Path | str,
    architecture: Architecture,
    task: Task,
    out: Path | str,
    *,
    mapping: Path | str | Mapping[str, str | None] | None = None,
    key: str | None = None,
    pattern: str | None = None,
    rest: Path | str | None = None,
    held_out: float = 1 / 6,
    seed: int = 0,
    overwrite: bool = False,
) -> tuple[Zoo, list[Skipped]]:
    """A zoo from a folder of state dicts, with its sub-folders, without hidden files.

    Files are those whose names end as `statefiles.SUFFIXES`, in any case, sharded with an index as
    Hugging Face does it or whole; links are followed. The dict inside that holds the network is
    taken, and what stands before all its names is stripped. Accuracies are unknown. Buffers that
    are not BatchNorm's statistics are kept once for all networks. What is not used, in files and
    beside them, is named in `import.json`.

    A file is one model, at epoch 0, unless its name has a number after `epoch`, `ep`, `checkpoint`,
    `ckpt`, `step` or `iter` (`epoch_12`, `ckpt-12`, `checkpoint_000012`): files of one folder whose
    names differ in such numbers, and in figures as `loss=0.31`, are epochs of one model. A file
    without a number takes its folder's (`checkpoint-500/model.safetensors`). This decides what may
    be held out, so names matter: `best.pt` beside a model's epochs is a model of its own, unless it
    equals one of them. A file with exactly the weights of another is skipped.

    Args:
        architecture: the networks' architecture; its activation and preprocessing are not in the
            files.
        mapping: a YAML or JSON file, or a dict, `theirs: ours` of tensor names; null drops a tensor.
        key: where in a file the weights lie, as in `statefiles.open_states`.
        pattern: a regular expression of paths, as `(?P<model>run\\d+)/(?P<epoch>\\d+)`, in place of
            the rule above; files in whose paths it finds nothing are not used.
        rest: a state dict of a whole network, where the checkpoints hold some of its tensors only
            (p-diff): all others are kept once, from there.
        held_out: the share of models, drawn by `seed`, kept from everything that learns.

    Returns:
        The zoo, and the skipped files with reasons; paths are relative to `path`.

    Raises:
        FlownError: no folder, no usable checkpoint in it (the first reasons are named), an unknown
            network or tensor in `mapping`, networks whose buffers differ, or `out` exists or
            overlaps `path`.
    """
    naming = _naming(architecture, mapping)
    path = _folder(path)
    found, others = discover(path, compile_pattern(pattern) if pattern is not None else None)
    frozen: dict[str, Tensor] = {}
    if rest is not None:
        found = [one for one in found if one.path.resolve() != Path(rest).resolve()]
        whole = _whole(naming, Path(rest))
        naming = _subset(naming, found, path, key)
        frozen = {name: x for name, x in whole.items() if name not in naming.layout.names}
    job = Import(
        "checkpoints",
        path,
        naming,
        task,
        read=lambda file: statefiles.open_states(file.path, key),
        distinct=True,
        others=others,
        rest=frozen,
    )
    return job.run(found, out, held_out, seed, overwrite), job.skipped


def from_modelzoos(
    path: Path | str,
    architecture: Architecture,
    task: Task,
    out: Path | str,
    *,
    epochs: Sequence[int] | None = None,
    held_out: float = 1 / 6,
    seed: int = 0,
    overwrite: bool = False,
) -> tuple[Zoo, list[Skipped]]:
    """A zoo from Model Zoos' folders of Ray Tune trials (Schürholt et al. 2022).

    A trial is a model: a folder with `checkpoint_12/checkpoints` or `checkpoint_000012/checkpoints`,
    and `result.json` and `params.json` where they were kept. `module_list.` is stripped from names;
    where names still differ and the shapes are the network's in its order, that order is taken.

    Accuracies are `train_acc` and `validation_acc` or `val_acc`; `test_acc` is never used, because
    networks chosen by it could not be tested on it. A trial whose `model::nlin` is not the task's
    activation is skipped: with another activation its weights compute something else.

    Args:
        architecture: the networks' architecture; its activation and preprocessing are not in the
            files.
        epochs: only these; by default all that were kept.
        held_out: the share of models, drawn by `seed`, kept from everything that learns.

    Returns:
        The zoo, and the skipped files with reasons; paths are relative to `path`.

    Raises:
        FlownError: no folder, no trial in it, no usable checkpoint (the first reasons are named),
            an unknown network, or `out` exists or overlaps `path`.
    """
    naming = Naming.of(architecture, prefixes=(*PREFIXES, modelzoos.PREFIX), by_order=True)
    path = _folder(path)
    found, skipped, notes = modelzoos.trials(path, architecture.activation, epochs)
    job = Import("modelzoos", path, naming, task, read=_read, skipped=skipped, notes=notes)
    return job.run(found, out, held_out, seed, overwrite), job.skipped


def from_matrix(
    path: Path | str,
    architecture: Architecture,
    task: Task,
    out: Path | str,
    *,
    mapping: Path | str | Mapping[str, str | None] | None = None,
    held_out: float = 1 / 6,
    seed: int = 0,
    overwrite: bool = False,
) -> tuple[Zoo, list[Skipped]]:
    """A zoo from a folder with one matrix of all networks' weights, as `imports.matrix` describes it.

    Args:
        architecture, mapping, held_out: as `from_checkpoints`.

    Returns:
        The zoo, and the skipped rows with reasons.

    Raises:
        FlownError: as `from_checkpoints`, or `matrix.rows_of`.
    """
    naming = _naming(architecture, mapping)
    path = _folder(path)
    found, read = matrix.rows_of(path)
    job = Import("matrix", path, naming, task, distinct=True, read=read)
    return job.run(found, out, held_out, seed, overwrite), job.skipped


def _folder(path: Path | str) -> Path:
    path = Path(path)
    if not path.is_dir():
        raise FlownError(f"{path}: no such folder")
    return path


def _whole(naming: Naming, file: Path) -> dict[str, Tensor]:
    """A whole network's tensors and BatchNorm statistics, by the network's names.

    Raises:
        FlownError: the file has something else.
    """
    if not file.is_file():
        raise FlownError(f"{file}: no such file")
    try:
        states = statefiles.open_states(file).states
        state = states[naming.choose(states, statefiles.WRAPPERS)]
        tensors = naming.layout.unpack(naming.fit(state).vector[None])
    except FlownError as error:
        raise FlownError(f"{file}: {str(error).removeprefix(f'{file}: ')}") from None
    statistics = naming.statistics(state)
    return {name: tensor[0] for name, tensor in tensors.items()} | statistics


def _subset(naming: Naming, found: Sequence[Found], path: Path, key: str | None) -> Naming:
    """The naming of the tensors that the first of some checkpoints has which can be read."""
    first = ""
    for one in found:
        try:
            states = statefiles.open_states(one.path, key).states
            return naming.of_subset(states[naming.choose(states, statefiles.WRAPPERS)])
        except FlownError as error:
            first = first or f"{one.name}: {str(error).removeprefix(f'{one.path}: ')}"
    raise FlownError(f"{path}: nothing in it can be imported. {first}")


def _read(file: Found) -> statefiles.Opened:
    return statefiles.open_states(file.path)


def _naming(
    architecture: Architecture, mapping: Path | str | Mapping[str, str | None] | None
) -> Naming:
    """The naming by a mapping, in a file or given.

    Raises:
        FlownError: it names a tensor that the network does not have.
    """
    mapping = read_mapping(mapping) if isinstance(mapping, Path | str) else dict(mapping or {})
    naming = Naming.of(architecture, mapping=mapping)
    known = {*naming.layout.names, *naming.buffers}
    for source, target in naming.mapping.items():
        if not isinstance(source, str) or not isinstance(target, str | None):
            raise FlownError(f"mapping: expected two tensors' names, got {source!r}: {target!r}")
        if target is not None and target not in known:
            raise FlownError(f"mapping: {source!r}: {unknown('tensor', target, known)}")
    return naming
