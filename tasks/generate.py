"""Datasets of the reference family's tasks for lm-eval, generated when a task is loaded: no text ships.

A task's YAML names `generate.dataset` as its `custom_dataset` and the task of `effbench.reference.items` in its
`dataset_kwargs`.
"""

from datasets import Dataset, DatasetDict

from effbench.reference.items import items


def dataset(task: str, count: int = 1000, **_: object) -> DatasetDict:
    """`count` items of a task as the test split; lm-eval also passes the task's metadata, which is not needed."""
    return DatasetDict({"test": Dataset.from_list(items(task, count))})
