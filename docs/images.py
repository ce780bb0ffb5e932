# %% [markdown]
# # I have images
#
# A few images of each class go in, a working classifier comes out, without training. Here they are five images
# of each digit, which the generator never saw; yours may be arrays, PIL images or paths of files.

# %%
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import flown

images, labels = load_digits(return_X_y=True)
images = images.reshape(-1, 8, 8) / 16
rows = np.concatenate([np.flatnonzero(labels == digit)[:5] for digit in range(10)])
others = np.setdiff1d(np.arange(len(labels)), rows)[:500]

figure, axes = plt.subplots(5, 10, figsize=(6, 3))
for axis, row in zip(axes.T.flat, rows, strict=True):
    axis.imshow(images[row], cmap="gray")
    axis.axis("off")

# %% [markdown]
# `fit` generates twenty networks, and nothing is trained; their mean prediction is the answer.

# %%
classifier = flown.ImageClassifier(n=20, unknown=0.05)
classifier.fit(images[rows], labels[rows])
share = (classifier.predict_proba(images[others]).argmax(axis=1) == labels[others]).mean()
print(f"{share:.1%} of {len(others)} new images are right")

# %% [markdown]
# With `unknown` it may answer that an image is of none of the classes, which numbers write as -1. About five
# images in a hundred of the classes may be called so too; with five images a class it is some more.


# %%
def called_unknown(some):
    return f"{(classifier.predict(some) == -1).mean():.0%}"


turned = images[others[~np.isin(labels[others], [0, 1, 8])]][:, ::-1]
print("digits called unknown:                      ", called_unknown(images[others]))
print("all but 0, 1 and 8 upside down, likewise:   ", called_unknown(turned))

# %% [markdown]
# The networks are ordinary ones. They leave the house as one ONNX graph from pixels to probabilities, as one C
# file for a microcontroller, or as a state dict:
#
# ```
# flown generate --support photos/ --out nets.safetensors
# flown export nets.safetensors --to c --int8 --out net.c
# ```
#
# For photographs of things, [`flown fewshot`](fewshot.md) is the better tool. [What it cannot do](limits.md) has the
# rest, and [`flown play`](play.md) shows all of it in a browser.
