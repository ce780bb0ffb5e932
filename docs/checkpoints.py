# %% [markdown]
# # I have checkpoints
#
# A folder of state dicts becomes a zoo: looked at, aligned, learned from. Here are eight networks of one shape,
# trained the usual way and saved with `torch.save`.

# %%
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

import flown
from flown.measure.novelty import nearest_distance
from flown.nets.architecture import Architecture
from flown.zoo.align.align import align_zoo
from flown.zoo.imports.checkpoints import from_checkpoints

folder = Path(tempfile.mkdtemp())
digits = flown.load_data("digits")
architecture = Architecture(
    net="cnn-small", channels=1, size=28, outputs=10, activation="tanh", mean=0.3, std=0.37
)
x, y = architecture.preprocess(digits.train.images), digits.train.labels

(folder / "runs").mkdir()
for seed in range(8):
    torch.manual_seed(seed)
    net = architecture.build()
    for layer in net.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(4):
        for batch in torch.randperm(len(x)).split(64):
            optimiser.zero_grad()
            F.cross_entropy(net(x[batch]), y[batch]).backward()
            optimiser.step()
    torch.save(net.state_dict(), folder / "runs" / f"net-{seed}.pt")

# %% [markdown]
# On the command line the next line is `flown zoo import runs --net cnn-small --data digits --out zoo`. Pickles are
# opened as weights only, and what cannot be read is listed with its reason.

# %%
task = flown.Task(id="digits", dataset="digits", classes=tuple(map(str, range(10))))
zoo, skipped = from_checkpoints(folder / "runs", architecture, task, folder / "zoo")
batch = zoo.batch("digits")
print(batch, "skipped:", skipped)
print("accuracies:", flown.evaluate(batch, digits.test.images, digits.test.labels))

# %% [markdown]
# Networks that were trained apart have their units in orders of their own, so what lies between two of them is no
# network. `flown zoo align` brings them into one order; what they compute does not change.

# %%
aligned = align_zoo(zoo, folder / "aligned").batch("digits")


def middle(batch):
    """Accuracy of networks half-way between neighbours."""
    halves = batch.on((batch.vectors[:-1] + batch.vectors[1:]) / 2)
    return flown.evaluate(halves, digits.test.images, digits.test.labels).mean()


for name, some in (("as they came", batch), ("aligned", aligned)):
    apart = nearest_distance(some.vectors[:4], some.vectors[4:]).mean()
    whole = flown.evaluate(some, digits.test.images, digits.test.labels).mean()
    print(f"{name}: accuracy {whole:.1f} %, half-way {middle(some):.1f} %, distance {apart:.1f}")

# %% [markdown]
# From here a generator is one command, `flown fit --zoo aligned --out run`, better with a hundred networks than with
# eight, and its report card another: `flown evaluate run/model --zoo aligned --out card`. [Zoos](zoos.md) has
# the rest: recipes, other formats, networks of your own.
