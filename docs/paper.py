# %% [markdown]
# # I want to reproduce the paper
#
# Every table is one command. `--scale smoke` shows in a minute or two that it runs, `--scale cpu` takes minutes to
# hours on two cores and gave the figures of [the tables](tables.md), `--scale paper` is the paper's own size.
#
# ```
# FLOWN_DATA=/folder/with/npz flown reproduce table2 --scale cpu --out table2
# ```
#
# Killed at any point, the same line with `--resume` goes on. What comes out is a page to look at and a JSON file
# with commit, command, config, counts of images, hardware and seconds. Here is a study at the smallest scale.

# %%
import tempfile
from pathlib import Path

from flown.experiments.trajectory import trajectory

out = Path(tempfile.mkdtemp()) / "trajectory"
_ = trajectory(out, "smoke")

# %%
import json

results = json.loads((out / "results.json").read_text("utf-8"))
print({key: results["provenance"][key] for key in ("command", "device", "seconds")})
results["rows"][:2]

# %% [markdown]
# | command | what it asks | committed |
# | --- | --- | --- |
# | `flown reproduce table1 --out table1` | generated networks beside a zoo's, unconditionally | [results](../results/table1/report.html) |
# | `flown reproduce table2 --out table2` | one generator for several data sets, by context | [results](../results/table2/report.html) |
# | `flown reproduce table3 --out table3` | generated networks as initialisations | [results](../results/table3/report.html) |
# | `flown reproduce table4 --out table4` | the generator fine-tuned to another data set | [results](../results/table4/report.html) |
# | `flown reproduce table5 --out table5` | heads for a few images of each class | [results](../results/table5/report.html) |
#
# Where the paper is silent, what was chosen is said beside the table, and so is what does not hold.
