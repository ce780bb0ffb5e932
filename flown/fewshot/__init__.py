"""Few-shot classification: tasks over cached features, classifiers for them, a user's own folder."""

from flown.fewshot.tasks import Tasks, check_disjoint, draw_tasks, folder_tasks

__all__ = ["Tasks", "check_disjoint", "draw_tasks", "folder_tasks"]
