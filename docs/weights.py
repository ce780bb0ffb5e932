# %% [markdown]
# # I research weight space
#
# A zoo, an encoder of its weights, a flow from noise to them. `flown-small` ships with the zoo that it was fitted
# on, so all of it can be looked into at once.

# %%
import matplotlib.pyplot as plt
import torch

import flown
from flown.generator.files import shipped_zoo
from flown.measure.evaluate import predictions
from flown.measure.novelty import held_out_distance, mutual_iou, nearest_distance
from flown.tasks import draw_support

model = flown.Flown.from_pretrained("flown-small")
zoo = flown.Zoo.open(shipped_zoo("flown-small"))
for name, task in zoo.tasks.items():
    print(
        f"{name}: {len(zoo.batch(name))} networks, {zoo.layout(name).size} weights, {task.dataset}"
    )

# %% [markdown]
# Five images a class say which task is meant. Every network that the flow gives is shown, none is chosen; beside
# them stand the networks of the zoo.

# %%
mnist = flown.load_data("mnist5k")
some = draw_support(mnist.train, classes=10, shots=5, generator=torch.Generator().manual_seed(0))
made = model.generate(some.images, some.labels, n=40, seed=0)
task = next(name for name, task in zoo.tasks.items() if "mnist" in name and "fashion" not in name)
train = zoo.select(split="train").batch(task)
held_out = zoo.select(split="held-out").batch(task)

figure, axis = plt.subplots(figsize=(6, 2.5))
for place, (name, batch) in enumerate(
    {"zoo": train, "held out": held_out, "generated": made}.items()
):
    accuracy = flown.evaluate(batch, mnist.test.images, mnist.test.labels)
    axis.scatter(accuracy, torch.full_like(accuracy, place), s=12, label=name)
_ = axis.set(
    yticks=range(3), yticklabels=["zoo", "held out", "generated"], xlabel="test accuracy, %"
)

# %% [markdown]
# Are they new? A distance of 1 is as far from the nearest training network as an independently trained one is, 0 is
# a copy. And do they err in the same places? An overlap (IoU) of 1 is one and the same classifier.

# %%
unit = held_out_distance(train.vectors, held_out.vectors)
print(
    f"distance of generated networks: {nearest_distance(made.vectors, train.vectors).mean() / unit:.2f}"
)
for name, batch in {"trained": train[:20], "generated": made[:20]}.items():
    wrong = predictions(batch, mnist.test.images) != mnist.test.labels
    print(f"overlap of errors, {name}: {mutual_iou(wrong):.2f}")

# %% [markdown]
# `model.reconstruct` is decode(encode(w)); the latents themselves are `model.space.encode(batch)`.

# %%
back = model.reconstruct(train)
print("reconstructed:", flown.evaluate(back, mnist.test.images, mnist.test.labels).mean())
latents = model.space.encode(train).flatten(1)
_, _, axes = torch.pca_lowrank(latents, 2)
of_made = (model.space.encode(made).flatten(1) - latents.mean(0)) @ axes
of_zoo = (latents - latents.mean(0)) @ axes
figure, axis = plt.subplots(figsize=(4, 4))
axis.scatter(*of_zoo.T, s=12, label="zoo")
axis.scatter(*of_made.T, s=12, label="generated")
axis.set(xlabel="first principal direction of latents", ylabel="second")
_ = axis.legend()

# %% [markdown]
# Encoders, sources, couplings and paths are chosen by name in a config (`flown fit --help`), and
# [a new one is one file](../CONTRIBUTING.md). [New and accurate](novelty.md) is the study of what makes generated
# networks both; [any task](any-task.md) is the generator that needs no zoo.
