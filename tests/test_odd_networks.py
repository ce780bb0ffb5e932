"""A network is what its module computes, however it is built: one truth from training to import."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flown import evaluate, nets
from flown.base.errors import FlownError
from flown.measure.finetune import FinetuneConfig, finetune
from flown.nets import plain
from flown.nets.batched import stacked
from flown.nets.batched.program import Program
from flown.nets.structure.symmetry import groups
from flown.weights import construction
from flown.weights.batch import WeightBatch
from flown.weights.layout import WeightLayout
from flown.zoo import Recipe, Zoo, train_zoo
from flown.zoo.imports.checkpoints import from_checkpoints
from flown.zoo.train.shard import Plan, initial
from flown.zoo.train.train import layout_for
from flown.zoo.train.trainers import Threads
from tests import examples
from tests.odd_networks import ENTRIES, PARTS, RANDOM, WITH_STATE, Tied, made, named

SOME = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
TASK = examples.task()
IMAGES = examples.images("digits")


def recipe(net: str) -> Recipe:
    return Recipe(
        name="odd",
        dataset="digits",
        net=net,
        size=8,
        learning_rate=1e-3,
        batch_size=16,
        epochs=1,
        keep=(1,),
        max_train_images=48,
    )


def by_modules(batch: WeightBatch, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.stack([batch.module(i)(x) for i in range(len(batch))])


@SOME
@example("conv", ["values are looked at", "batch norm"])
@given(st.sampled_from(sorted(ENTRIES)), st.lists(st.sampled_from(sorted(PARTS)), max_size=3))
def test_one_truth(tmp_path_factory: pytest.TempPathFactory, entry: str, parts: list[str]) -> None:
    out = tmp_path_factory.mktemp("odd")
    try:
        hold_to_one_truth(made(entry, parts), out, not RANDOM & {entry, *parts})
    except FlownError as error:
        assert WITH_STATE & {entry, *parts}, f"refused for no reason: {error}"


@pytest.mark.parametrize("part", PARTS)
def test_one_truth_of_each_part(tmp_path: Path, part: str) -> None:
    name = made("conv", [part])
    if part in WITH_STATE - {"drawn buffer"}:
        with pytest.raises(FlownError, match=r"odd_networks_made:net\d+'.*(buffer|state dict)"):
            hold_to_one_truth(name, tmp_path, False)
    else:
        hold_to_one_truth(name, tmp_path, part not in RANDOM)


def hold_to_one_truth(name: str, out: Path, deterministic: bool) -> None:
    """Training, its accuracies, logits, modules, files and imports all say the same."""
    zoo = train_zoo(recipe(name), 2, out / "zoo", images=IMAGES, held_out=0.5)
    batch = zoo.batch("digits").calibrated(IMAGES.train.images)
    x = batch.preprocess(IMAGES.val.images)
    wanted = by_modules(batch, x)
    torch.testing.assert_close(batch.logits(x), wanted, atol=1e-5, rtol=1e-5)
    if deterministic:
        hits = (wanted.argmax(-1) == IMAGES.val.labels).float().mean(1)
        assert [row.val_accuracy for row in zoo.rows] == pytest.approx(
            (100 * hits).tolist(), abs=1e-3
        )
        starts = [alone(name, batch, zoo.rows[i].seed)(x) for i in range(2)]
        torch.testing.assert_close(torch.stack(starts), wanted, atol=1e-3, rtol=1e-3)
    batch.save(out / "nets.safetensors")
    torch.testing.assert_close(WeightBatch.load(out / "nets.safetensors").logits(x), wanted)
    (out / "files").mkdir()
    for i in range(2):
        torch.save(batch.module(i).state_dict(), out / "files" / f"run{i}.pt")
    theirs, skipped = from_checkpoints(
        out / "files", batch.layout.architecture, TASK, out / "imported", held_out=0.5
    )
    assert not skipped
    again = theirs.batch("digits").calibrated(IMAGES.train.images)
    torch.testing.assert_close(again.logits(x), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(by_modules(again, x), wanted, atol=1e-5, rtol=1e-5)


def alone(name: str, batch: WeightBatch, seed: int) -> nn.Module:
    """The network of a zoo's seed, trained by PyTorch alone."""
    net = construction.build_seeded(batch.layout, seed)
    construction.fill(net, batch.frozen)
    x, y = batch.preprocess(IMAGES.train.images[:48]), IMAGES.train.labels[:48]
    adam = torch.optim.Adam(net.parameters(), 1e-3)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(seed * 1_000 + 1))
    for rows in order.split(16):
        adam.zero_grad()
        F.cross_entropy(net.train()(x[rows]), y[rows]).backward()
        adam.step()
    return net.eval().requires_grad_(False)


@pytest.mark.parametrize("part", [*list(PARTS)[:4], "hook", "same layer twice", "weight norm"])
def test_fast_loops_are_for_plain_networks_only(part: str) -> None:
    net = nets.build(made("conv", [part]), 1, 10, "tanh")
    ordinary = part in list(PARTS)[:4]
    assert (plain.layers(net) is not None) == ordinary
    assert (Program.of(net, (1, 8, 8)) is not None) == (ordinary and part != "gelu")


def test_a_loop_that_differs_from_the_module_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(108, 4))
    tensors = {name: torch.randn(3, *p.shape) for name, p in net.named_parameters()}
    x = torch.randn(5, 1, 8, 8)
    wanted = torch.stack(
        [
            torch.func.functional_call(net, {k: v[i] for k, v in tensors.items()}, (x,))
            for i in range(3)
        ]
    )
    monkeypatch.setattr(plain, "_AGREEMENTS", {})
    monkeypatch.setattr(Program, "_logits", lambda *_: torch.zeros(2, 2, 4))
    monkeypatch.setattr(stacked, "_forward", lambda *_: torch.zeros(2, 2, 4))
    torch.testing.assert_close(stacked.forward(net, tensors, x), wanted)
    assert Threads.of(net, torch.zeros(1, 490), x, 5, [1.0], [0.0]) is None


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Flatten(2), nn.Flatten(), nn.Linear(64, 3)],
        [nn.Flatten(), nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 3, 8), nn.Flatten()],
        [nn.Linear(8, 2), nn.Flatten(), nn.Linear(16, 3)],
        [nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(128, 3)],
    ],
    ids=["flatten twice", "conv after flatten", "linear before flatten", "circular padding"],
)
def test_other_orders_and_settings(layers: list[nn.Module]) -> None:
    net = nn.Sequential(*layers)
    tensors = {name: torch.randn(3, *p.shape) for name, p in net.named_parameters()}
    x = torch.randn(5, 1, 8, 8)
    found = stacked.forward(net, tensors, x)
    for i in range(3):
        alone = torch.func.functional_call(net, {k: v[i] for k, v in tensors.items()}, (x,))
        torch.testing.assert_close(found[i], alone, atol=1e-4, rtol=1e-4)


def written(folder: Path, states: list[dict[str, Tensor]]) -> Path:
    folder.mkdir()
    for i, state in enumerate(states):
        torch.save(state, folder / f"run{i}.pt")
    return folder


def test_buffers_of_imports_are_kept_or_refused(tmp_path: Path) -> None:
    name = made("conv", ["drawn buffer"])
    architecture = layout_for(recipe(name), IMAGES).architecture
    builds = [nets.build(name, 1, 10, "tanh") for _ in range(3)]
    states = [net.state_dict() for net in builds]
    (buffer,) = construction.drawn(architecture)
    with pytest.raises(FlownError, match=rf"buffer '{buffer}' differs between run0.pt and run1.pt"):
        from_checkpoints(written(tmp_path / "differ", states), architecture, TASK, tmp_path / "zoo")
    assert not (tmp_path / "zoo").exists()
    bare = [{k: v for k, v in state.items() if k != buffer} for state in states]
    with pytest.raises(FlownError, match=rf"buffer '{buffer}' is missing"):
        from_checkpoints(written(tmp_path / "bare", bare), architecture, TASK, tmp_path / "zoo")
    for net in builds[1:]:
        construction.fill(net, {buffer: states[0][buffer]})
    path = written(tmp_path / "alike", [net.state_dict() for net in builds])
    zoo, skipped = from_checkpoints(path, architecture, TASK, tmp_path / "zoo")
    x = torch.randn(4, 1, 8, 8)
    order = [row.seed for row in zoo.rows]
    with torch.no_grad():
        wanted = torch.stack([builds[i].eval()(x) for i in order])
    torch.testing.assert_close(Zoo.open(zoo.path).batch("digits").logits(x), wanted)
    assert not skipped
    unknown = WeightBatch(zoo.layout("digits"), zoo.batch("digits").vectors)
    with pytest.raises(FlownError, match=rf"draws buffer '{buffer}' at random"):
        unknown.logits(x)
    with pytest.raises(FlownError, match=rf"buffer '{buffer}' is \(3,\), expected \(6,\)"):
        construction.fill(builds[0], {buffer: torch.zeros(3)})


def test_buffers_that_training_changed_are_not_dropped(tmp_path: Path) -> None:
    """Statistics of instance norm: those of a fresh network would be other networks'."""
    name = made("instance norm", [])
    architecture = layout_for(recipe(name), IMAGES).architecture
    net = nets.build(name, 1, 10, "tanh")
    states = []
    for _ in range(2):
        net.train()(torch.randn(8, 1, 8, 8))
        states.append({k: v.clone() for k, v in net.state_dict().items()})
    with pytest.raises(FlownError, match=r"buffer '1.running_mean' differs.*: null`"):
        from_checkpoints(written(tmp_path / "runs", states), architecture, TASK, tmp_path / "zoo")
    with pytest.raises(FlownError, match=r"training changes its buffer '1.running_mean'"):
        train_zoo(recipe(name), 2, tmp_path / "trained", images=IMAGES)


def test_tied_weights_have_one_name_or_two(tmp_path: Path) -> None:
    name = named(lambda channels, classes: nn.Sequential(nn.Flatten(), nn.Linear(64, 6), Tied()))
    architecture = layout_for(recipe(name), IMAGES).architecture
    architecture = architecture.model_copy(update={"outputs": 6})
    net = nets.build(name, 1, 6, "tanh")
    state = net.state_dict()
    assert construction.second_names(net) == {"2.second.weight": "2.first.weight"}
    other = {k: v + 1 for k, v in state.items() if k != "2.second.weight"}
    late = {k: v + 2 for k, v in state.items() if k != "2.first.weight"}
    wrong = state | {"2.second.weight": torch.zeros(6, 6)}
    path = written(tmp_path / "runs", [state, other, late, wrong])
    zoo, skipped = from_checkpoints(path, architecture, TASK, tmp_path / "zoo")
    assert [one.path for one in skipped] == ["run3.pt"]
    assert "one tied weight" in skipped[0].reason
    batch = zoo.batch("digits")
    for i, base in enumerate([0, 1, 2]):
        held = batch.state_dict(i)
        assert held.keys() == state.keys()
        assert all(torch.equal(held[k], state[k] + base) for k in state)


class Exotic(nn.Module):
    def __init__(self, classes: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.wave = nn.Parameter(torch.ones(3, dtype=dtype))
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda classes: nn.Sequential(nn.Flatten(), nn.LazyLinear(classes)),
            "'1.weight' of a lazy",
        ),
        (lambda classes: Exotic(classes, torch.complex64), "'wave' holds complex64"),
        (lambda classes: Exotic(classes, torch.float16), "'wave' holds float16"),
        (lambda classes: nn.Sequential(nn.Flatten(), nn.MaxPool1d(6)), "has no parameters"),
    ],
)
def test_parameters_that_a_vector_cannot_hold(
    make: Callable[[int], nn.Module], message: str
) -> None:
    name = named(lambda channels, classes: make(classes))
    with pytest.raises(FlownError, match=f"'{name}'.*{message}"):
        layout_for(recipe(name), IMAGES)


def test_default_initialisation_is_the_constructors() -> None:
    layout = layout_for(recipe(made("conv", ["own values", "scalar"])), IMAGES)
    one, again, other = (initial(layout, "default", seed) for seed in (3, 3, 4))
    assert all(torch.equal(one[name], again[name]) for name in layout.names)
    assert not torch.equal(one["0.weight"], other["0.weight"])
    fixed = [name for name in layout.names if torch.equal(one[name], other[name])]
    assert [(name, one[name].unique().tolist()) for name in fixed] == [
        ("5.gain", [pytest.approx(1e-3)]),
        ("5.place", [0.0]),
        ("6.weight", [0.25]),
        ("7.factor", [pytest.approx(0.7)]),
    ]
    built = construction.build_seeded(layout, 3).state_dict()
    assert all(torch.equal(one[name], built[name]) for name in layout.names)
    uniform = initial(layout, "uniform", 3)
    assert float(uniform["7.factor"]) == pytest.approx(0.7)


@pytest.mark.parametrize("net", sorted(nets.DEFAULT_INITIALISED))
def test_networks_drawn_by_rule_have_pytorchs_initialisation(net: str) -> None:
    """The rule's draws and the constructor's have the same bounds, tensor by tensor."""
    shape = {"net": net, "channels": 64, "size": nets.INPUT_SIZES[net]}
    architecture = examples.architecture().model_copy(update=shape)
    layout = WeightLayout.of(architecture.build(), architecture)
    ruled = [initial(layout, "default", seed) for seed in range(30)]
    built = [construction.build_seeded(layout, seed).state_dict() for seed in range(30)]
    for name in layout.names:
        one, other = (torch.stack([s[name] for s in some]).abs() for some in (ruled, built))
        assert float(one.max()) == pytest.approx(float(other.max()), rel=0.1), name
        assert float(one.mean()) == pytest.approx(float(other.mean()), rel=0.2), name


def test_drawing_leaves_the_global_generator_alone() -> None:
    layout = layout_for(recipe(made("conv", ["drawn buffer"])), IMAGES)
    before = torch.random.get_rng_state()
    initial(layout, "default", 0)
    construction.drawn_once(layout, Plan(recipe(layout.net), 2, 0, 0.5).base_seed)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("part", ["hook", "patched", "weight norm", "old weight norm"])
def test_permutations_of_altered_modules_are_refused(part: str) -> None:
    net = nets.build(made("conv", [part]), 1, 10, "tanh")
    with pytest.raises(FlownError, match="hooks or a parametrisation"):
        groups(net, torch.zeros(1, 1, 8, 8))


def test_zoos_with_a_shared_buffer_are_evaluated_with_it(tmp_path: Path) -> None:
    zoo = train_zoo(recipe(made("conv", ["drawn buffer"])), 2, tmp_path / "zoo", images=IMAGES)
    batch, val = zoo.batch("digits"), IMAGES.val
    stored = [row.val_accuracy for row in zoo.rows]
    assert evaluate(batch, val.images, val.labels).tolist() == pytest.approx(stored, abs=1e-3)


def test_subset_zoos_of_tied_weights_and_drawn_buffers(tmp_path: Path) -> None:
    name = made("conv", ["tied", "drawn buffer"])
    subset = recipe(name).model_copy(update={"subset": ("5.first.weight",), "base_epochs": 1})
    for resume in (False, True):  # the second time the base is on the disk
        zoo = train_zoo(subset, 2, tmp_path / "zoo", images=IMAGES, resume=resume)
    batch, val = zoo.batch("digits"), IMAGES.val
    assert {"5.first.bias", "6.shift"} <= batch.frozen.keys()
    assert "5.second.weight" not in batch.frozen
    x = batch.preprocess(val.images)
    torch.testing.assert_close(batch.logits(x), by_modules(batch, x), atol=1e-5, rtol=1e-5)
    stored = [row.val_accuracy for row in zoo.rows]
    assert evaluate(batch, val.images, val.labels).tolist() == pytest.approx(stored, abs=1e-3)


def test_finetuning_keeps_a_shared_buffer(tmp_path: Path) -> None:
    """Trained by PyTorch alone, with the zoo's buffer, a network ends at the same weights."""
    zoo = train_zoo(recipe(made("conv", ["drawn buffer"])), 2, tmp_path / "zoo", images=IMAGES)
    batch = zoo.batch("digits")
    config = FinetuneConfig(epochs=1, batch_size=16, learning_rate=1e-3, max_train_images=48)
    tuned = finetune(batch, IMAGES, config).networks
    net = batch.module(1).train()
    x, y = batch.preprocess(IMAGES.train.images[:48]), IMAGES.train.labels[:48]
    adam = torch.optim.Adam(net.parameters(), 1e-3)
    seed = config.seed * 1_000_003 + 1
    order = torch.randperm(48, generator=torch.Generator().manual_seed(seed * 1_000 + 1))
    for rows in order.split(16):
        adam.zero_grad()
        F.cross_entropy(net(x[rows]), y[rows]).backward()
        adam.step()
    torch.testing.assert_close(tuned.module(1)(x), net(x), atol=1e-3, rtol=1e-3)
