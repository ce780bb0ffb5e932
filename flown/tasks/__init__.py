"""Images as tensors: by name or from a folder, in three parts; support sets and episodes."""

from flown.tasks.classes import in_order, labels_in
from flown.tasks.folder import image_files, load_folder, read_image, stack
from flown.tasks.named import Source, available, cache_folder, describe, load, load_many
from flown.tasks.splits import ImageData, ManyClass, Split, three_way
from flown.tasks.support import (
    Episode,
    Support,
    check_support,
    draw_episode,
    draw_support,
    load_support,
)

__all__ = [
    "Episode",
    "ImageData",
    "ManyClass",
    "Source",
    "Split",
    "Support",
    "available",
    "cache_folder",
    "check_support",
    "describe",
    "draw_episode",
    "draw_support",
    "image_files",
    "in_order",
    "labels_in",
    "load",
    "load_folder",
    "load_many",
    "load_support",
    "read_image",
    "stack",
    "three_way",
]
