"""The figures in docs/tables.md are those of results/: its tables are written out again and compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from flown.base.files import read_json
from flown.base.provenance import Row
from flown.report import anytask, unknown
from flown.report import variants as report_variants

ROOT = Path(__file__).parents[1]
SETS = ("mnist", "fashion_mnist", "cifar10", "natural10")


def results(name: str) -> list[Row]:
    rows: list[Row] = read_json(ROOT / "results" / name / "cpu.json")["rows"]
    return rows


def the(rows: list[Row], metric: str = "accuracy", **wanted: object) -> Row:
    """The one row that has all of these values; `selection` is compared by how it begins."""
    begins = str(wanted.pop("selection", "all"))
    found = [
        r
        for r in rows
        if r["metric"] == metric
        and r["selection"].startswith(begins)
        and all(r[key] == value for key, value in wanted.items())
    ]
    assert len(found) == 1, (metric, begins, wanted, len(found))
    return found[0]


def cell(row: Row, digits: int = 1) -> str:
    spread = "" if row["std"] is None else f" ± {row['std']:.{digits}f}"
    return f"{row['value']:.{digits}f}{spread}"


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table1() -> str:
    rows, body = results("table1"), []
    for net, encoder, dataset in dict.fromkeys(
        (r["net"], r["encoder"], r["dataset"]) for r in rows
    ):
        place = {"net": net, "encoder": encoder, "dataset": dataset}
        methods = ("zoo", "flown", "p-diff")
        body.append(
            [
                f"{net} ({encoder}), {dataset}",
                *(cell(the(rows, **place, method=m)) for m in methods),
                *(cell(the(rows, **place, method=m, selection="val-best")) for m in methods),
                *(cell(the(rows, "seconds", **place, method=m)) for m in methods[1:]),
            ]
        )
    return table(
        (
            "network (encoder), data",
            "originals",
            "FLoWN",
            "p-diff",
            "best original",
            "best FLoWN",
            "best p-diff",
            "FLoWN, s",
            "p-diff, s",
        ),
        body,
    )


def table2() -> str:
    rows = results("table2")
    methods = {
        "zoo": "zoo",
        "flown": "FLoWN",
        "nearest": "lookup",
        "flown-kaiming": "from Kaiming",
        "flown-mini-imagenet-prior": "from a prior",
        "gaussian": "Gaussian of weights",
    }
    body = []
    for dataset in SETS:
        best = the(rows, dataset=dataset, method="flown", selection="val-top5")
        paper = "–" if best["paper"] is None else f"{best['paper']:.1f}"
        body.append(
            [
                dataset,
                *(cell(the(rows, dataset=dataset, method=m)) for m in methods),
                cell(best),
                paper,
            ]
        )
    return table(("data", *methods.values(), "FLoWN, best 5", "the paper's"), body)


def support_alone() -> str:
    """What a support set gives without a generator, on the data of Table 3."""
    rows, body = results("anytask"), []
    methods = ("nearest centroid of pixels", "scratch conv4-8", "flown-any conv4-32")
    for dataset in (*SETS, "usps", "svhn_small", "omniglot_full test"):
        found = {r["method"]: r for r in rows if r["row"] == f"{dataset}, 10-way 5-shot"}
        cells = (f"{found[m]['accuracy']:.1f} ± {found[m]['interval']:.1f}" for m in methods)
        body.append([dataset, *cells])
    return table(("data", "centroids of pixels", "trained on them alone", "`flown-any`"), body)


def table3() -> str:
    rows, body = results("table3"), []
    epochs = (0, 1, 5, 25)
    names = {
        "flown": "FLoWN",
        "flown-trajectory": "FLoWN through the epochs",
        "flown-any": "`flown-any`",
        "checkpoint": "a checkpoint",
        "default-init": "PyTorch's initialisation",
        "recipe-init": "the recipe's initialisation",
    }
    for dataset in (*SETS, "usps", "svhn_small", "omniglot_full"):
        for method, name in names.items():
            body.append(
                [
                    dataset,
                    name,
                    *(
                        cell(the(rows, dataset=dataset, method=method, epoch=epoch))
                        for epoch in epochs
                    ),
                ]
            )
    return table(("data", "start", *(f"epoch {epoch}" for epoch in epochs)), body)


def table4() -> str:
    rows, body = results("table4"), []
    methods = {
        "static": "static",
        "fine-tuned": "flow",
        "fine-tuned-decoder": "flow and decoder",
        "adjoint": "adjoint matching",
        "from-default-init": "from PyTorch's initialisation",
        "from-best-static": "from the best static",
        "zoo": "trained for it",
    }
    for net, encoder, source, dataset in dict.fromkeys(
        (r["net"], r["encoder"], r["source"], r["dataset"]) for r in rows
    ):
        place = {"net": net, "encoder": encoder, "source": source, "dataset": dataset}
        body.append(
            [
                f"{net} ({encoder}), {source} to {dataset}",
                *(cell(the(rows, **place, method=m)) for m in methods),
            ]
        )
    return table(("generator", *methods.values()), body)


GENERATED = {
    "flown": "FLoWN, from centroid heads",
    "flown-start": "the centroid head it starts from",
    "flown-mean": "the mean of its 50 heads",
    "flown+5": "FLoWN and 5 steps on the support set",
    "flown-gaussian": "FLoWN, from noise",
    "flown-gaussian-mean": "the mean of its 50 heads from noise",
    "d2nwg": "D2NWG",
    "d2nwg-v": "D2NWG, v-prediction",
}
HEADS = {
    "inductive": {
        **GENERATED,
        "vae-reconstruction": "a probed head, encoded and decoded",
        "linear-probe": "linear probe",
        "ridge": "ridge regression",
        "nearest-cosine": "nearest centroid, cosine",
        "nearest-euclidean": "nearest centroid, Euclidean",
        "maml-first-order": "MAML, first order",
        "caml": "CAML",
    },
    "transductive": {
        **GENERATED,
        "soft-kmeans": "soft k-means",
        "laplacian": "Laplacian smoothing",
    },
}
LEADS = {
    "inductive": {
        "flown - flown-start": "FLoWN over the head it starts from",
        "flown-mean - flown-start": "the mean of its heads over the same",
        "flown-mean - ridge": "the mean of its heads over ridge regression",
    },
    "transductive": {
        "flown - flown-start": "FLoWN over the head it starts from",
        "flown-mean - flown-start": "the mean of its heads over the same",
        "flown-mean - soft-kmeans": "the mean of its heads over soft k-means",
        "flown-mean - laplacian": "the mean of its heads over Laplacian smoothing",
    },
}


def table5(protocol: str, names: Mapping[str, Mapping[str, str]]) -> str:
    rows = [row for row in results("table5") if row["protocol"] == protocol]
    sets = ("mini_imagenet", "cifar10", "natural10", "omniglot")
    metric, sign = ("difference", "+") if names is LEADS else ("accuracy", "")
    body = [
        [
            name,
            *(
                f"{r['value']:{sign}.1f} ± {r['interval']:.1f}"
                for r in (the(rows, metric, dataset=data, method=method) for data in sets)
            ),
        ]
        for method, name in names[protocol].items()
    ]
    return table(("head", *sets), body)


@pytest.mark.parametrize("names", [HEADS, LEADS], ids=["heads", "leads"])
@pytest.mark.parametrize("protocol", ["inductive", "transductive"])
def test_table5_is_that_of_the_results(
    protocol: str, names: Mapping[str, Mapping[str, str]]
) -> None:
    made = table5(protocol, names)
    assert made in (ROOT / "docs" / "tables.md").read_text("utf-8"), made


@pytest.mark.parametrize("write", [table1, table2, table3, support_alone, table4])
def test_tables_are_those_of_the_results(write: Callable[[], str]) -> None:
    assert write() in (ROOT / "docs" / "tables.md").read_text("utf-8"), write()


SOLVERS = {
    "1": ("euler", 1),
    "2": ("euler", 2),
    "4": ("euler", 4),
    "4, midpoint": ("midpoint", 2),
    "4, Heun": ("heun", 2),
    "100": ("euler", 100),
}


def steps_by_flow() -> str:
    """Mean test accuracy over data sets, by flow and evaluations."""
    rows, body = results("steps"), []
    for flow in dict.fromkeys(r["flow"] for r in rows):
        cells = []
        for solver, count in SOLVERS.values():
            place = {"flow": flow, "solver": solver, "steps": count}
            found = [the(rows, dataset=name, **place)["value"] for name in SETS]
            cells.append(f"{sum(found) / len(found):.1f}")
        body.append([flow, *cells])
    return table(("flow", *SOLVERS), body)


def steps_by_set() -> str:
    """Test accuracy and IoU of errors among networks: the paper's flow, and the one that is kept."""
    rows, body = results("steps"), []
    shown = (("independent", 100), ("independent", 4), (KEPT, 100), (KEPT, 4), (KEPT, 1))
    for flow, count in shown:
        place = {"flow": flow, "solver": "euler", "steps": count}
        cells = [
            f"{the(rows, dataset=name, **place)['value']:.1f}, "
            f"{the(rows, 'diversity-iou', dataset=name, **place)['value']:.2f}"
            for name in SETS
        ]
        body.append([flow, str(count), *cells])
    return table(("flow", "evaluations", *SETS), body)


def cost_of_steps() -> str:
    """Seconds of the bench of sampling, and how many times less four evaluations take."""
    rows: list[Row] = read_json(ROOT / "results" / "bench" / "sample.json")["rows"]
    names = {"four evaluations": "flown-euler-4", "a hundred": "flown-euler-100"}
    names |= {"a DDPM's thousand": "ddpm-1000"}
    took = {
        k: the(rows, "seconds", selection="median", method=m)["value"] for k, m in names.items()
    }
    four = took.pop("four evaluations")
    others = ", ".join(f"{k} {v:.2f} s ({v / four:.0f} times as long)" for k, v in took.items())
    return f"four evaluations take {four:.2f} s, {others}"


KEPT = "semi-discrete, pseudo-huber, early"


@pytest.mark.parametrize("write", [steps_by_flow, steps_by_set, cost_of_steps])
def test_tables_of_steps_are_those_of_the_results(write: Callable[[], str]) -> None:
    assert write() in (ROOT / "docs" / "steps.md").read_text("utf-8"), write()


METHODS = {
    "conv4-32": "flown-any conv4-32",
    "cnn-small": "flown-any cnn-small",
    "centroid of pixels": "nearest centroid of pixels",
    "base body": "base body conv4-32",
    "scratch": "scratch conv4-8",
    "base conv4-8, 5 steps": "base trained 5 steps conv4-8",
    "base conv4-8, 50 steps": "base trained 50 steps conv4-8",
    "lookup": "lookup",
}
ABLATIONS = {
    "its support": "flown-any conv4-32",
    "another task's": "another task's support conv4-32",
    "labels shuffled": "shuffled labels conv4-32",
    "noise": "no support conv4-32",
}


def unseen(name: str) -> str:
    """A table of docs/any-task.md."""
    rows = results("anytask")
    made = {
        "leads": anytask.leads,
        "populations": lambda rows: anytask.populations(
            [
                row
                for row in rows
                if str(row["method"]).endswith(("conv4-32", "cnn-small"))
                or str(row["method"]).startswith("scratch")
            ]
        ),
        "methods": lambda rows: anytask.beside(rows, METHODS),
        "ablations": lambda rows: anytask.beside(rows, ABLATIONS),
    }
    return table(*made[name](rows))


@pytest.mark.parametrize("name", ["leads", "populations", "methods", "ablations"])
def test_tables_of_unseen_tasks_are_those_of_the_results(name: str) -> None:
    assert unseen(name) in (ROOT / "docs" / "any-task.md").read_text("utf-8"), unseen(name)


def variants(name: str) -> str:
    """A table of docs/any-task.md about ways to train, numbers of tasks and sizes."""
    rows = results("variants")
    groups = {"ways": report_variants.by_way, "counts": report_variants.by_count}
    return table(*report_variants.accuracies(groups[name](rows)))


@pytest.mark.parametrize("name", ["ways", "counts"])
def test_tables_of_variants_are_those_of_the_results(name: str) -> None:
    assert variants(name) in (ROOT / "docs" / "any-task.md").read_text("utf-8"), variants(name)


def test_the_table_of_unknown_images_is_that_of_the_results() -> None:
    found = table(*unknown.detection(results("unknown")))
    assert found in (ROOT / "docs" / "fewshot.md").read_text("utf-8"), found
