"""Images as tensors: by name or from a folder, in three parts; support sets and episodes."""

from flown.tasks.classes import in_order, labels_in
from flown.tasks.draw import ClassPool, Episodes, check_disjoint
from flown.tasks.folder import Pictures, load_folder, read_images, read_pictures
from flown.tasks.named import Source, available, cache_folder, load, load_any, load_many, summary
from flown.tasks.pictures import read_image, stack
from flown.tasks.splits import ImageData, ManyClass, Split, three_way
from flown.tasks.support import (
    Support,
    as_bytes,
    check_support,
    draw_support,
    load_support,
)
from flown.tasks.task import Task, TaskDraw, TaskTable

__all__ = [
    "ClassPool",
    "Episodes",
    "ImageData",
    "ManyClass",
    "Pictures",
    "Source",
    "Split",
    "Support",
    "Task",
    "TaskDraw",
    "TaskTable",
    "as_bytes",
    "available",
    "cache_folder",
    "check_disjoint",
    "check_support",
    "draw_support",
    "in_order",
    "labels_in",
    "load",
    "load_any",
    "load_folder",
    "load_many",
    "load_support",
    "read_image",
    "read_images",
    "read_pictures",
    "stack",
    "summary",
    "three_way",
]
