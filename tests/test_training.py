"""The training loop: it learns, averages, resumes to the same bits, refuses NaN."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from flown.base.errors import FlownError, TrainingError
from flown.training import TrainConfig, train


class Line(nn.Module):
    """Fits y = 3 x - 1 from random points."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.calls, self.stop_at = 0, stop_at

    def forward(self, generator: torch.Generator) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        x = torch.randn(32, 1, generator=generator)
        return (self.linear(x) - 3 * x + 1).square().mean()


CONFIG = TrainConfig(
    steps=120,
    learning_rate=0.1,
    warmup=5,
    ema=0.9,
    checkpoint_every=10,
    validate_every=20,
    weight_decay=0.0,
)


def test_it_learns(tmp_path: Path) -> None:
    line = Line()
    history = train(line, CONFIG, out=tmp_path, name="line", validate=lambda: {"two": 2.0})
    assert [record["step"] for record in history] == [20, 40, 60, 80, 100, 120]
    assert history[-1]["two"] == 2.0 and history[-1]["loss"] < history[0]["loss"]
    assert abs(line.linear.weight.item() - 3) < 0.1 and abs(line.linear.bias.item() + 1) < 0.1
    assert not line.training


@pytest.mark.parametrize("stop_at", [5, 10, 11, 37, 120])
def test_resuming_gives_the_same_bits(tmp_path: Path, stop_at: int) -> None:
    whole = Line()
    history = train(whole, CONFIG, out=tmp_path / "a", name="line")
    with pytest.raises(KeyboardInterrupt):
        train(Line(stop_at), CONFIG, out=tmp_path / "b", name="line")
    resumed = Line()
    again = train(resumed, CONFIG, out=tmp_path / "b", name="line", resume=True)
    assert resumed.calls <= 120 - (stop_at - 1) // 10 * 10, "no more than one interval is lost"
    assert torch.equal(whole.linear.weight, resumed.linear.weight)
    assert again == history, "losses of before the interruption count too"


class Late(Line):
    """One whose other layer has a loss from the seventieth call on."""

    def __init__(self, stop_at: int | None = None, before: int = 0) -> None:
        super().__init__(stop_at)
        self.other, self.before = nn.Linear(1, 1, bias=False), before
        nn.init.ones_(self.other.weight)

    def forward(self, generator: torch.Generator) -> torch.Tensor:
        loss = super().forward(generator)
        late = self.before + self.calls >= 70
        return loss + self.other.weight.square().sum() if late else loss


def test_a_parameter_that_no_loss_has_reached_yet_is_resumed(tmp_path: Path) -> None:
    whole = Late()
    train(whole, CONFIG, out=tmp_path / "a", name="late")
    with pytest.raises(KeyboardInterrupt):
        train(Late(45), CONFIG, out=tmp_path / "b", name="late")
    resumed = Late(before=40)
    train(resumed, CONFIG, out=tmp_path / "b", name="late", resume=True)
    assert torch.equal(resumed.other.weight, whole.other.weight) and whole.other.weight < 1


@pytest.mark.parametrize("stop_at", [None, 50, 75])
def test_the_best_by_validation_is_kept(tmp_path: Path, stop_at: int | None) -> None:
    """What validation liked best at step 40 is what a run of 40 steps has at its end."""
    config = CONFIG.model_copy(update={"schedule": "constant", "choose": "liked"})
    short = Line()
    train(
        short, config.model_copy(update={"steps": 40, "choose": None}), out=tmp_path, name="short"
    )

    def run(line: Line, first: int = 0) -> None:
        def validate() -> dict[str, float]:
            return {"liked": -abs(first + line.calls - 40)}

        train(line, config, out=tmp_path, name="line", resume=first > 0, validate=validate)

    line, first = Line(stop_at), 0
    if stop_at:
        with pytest.raises(KeyboardInterrupt):
            run(line)
        line, first = Line(), (stop_at - 1) // 10 * 10
    run(line, first)
    assert torch.equal(line.linear.weight, short.linear.weight)
    with pytest.raises(FlownError, match="unknown figure 'liked'"):
        train(Line(), config, out=tmp_path, name="other", validate=lambda: {"like": 1.0})


def test_nan_is_an_error(tmp_path: Path) -> None:
    line = Line()
    nn.init.constant_(line.linear.weight, float("inf"))
    with pytest.raises(TrainingError, match=r"line: the loss is (nan|inf) at step 10"):
        train(line, CONFIG, out=tmp_path, name="line")
    assert not list(tmp_path.iterdir()), "a broken state is not checkpointed"


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    train(Line(), CONFIG, out=tmp_path, name="line")
    other = Line()
    other.linear = nn.Linear(2, 1)
    with pytest.raises(FlownError, match=r"'linear.weight' is \(1, 1\), expected \(1, 2\)"):
        train(other, CONFIG, out=tmp_path, name="line", resume=True)


def test_no_steps(tmp_path: Path) -> None:
    with pytest.raises(FlownError, match="at least 1"):
        train(Line(), CONFIG.model_copy(update={"steps": 0}), out=tmp_path, name="line")
