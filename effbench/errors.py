"""What effbench raises. Each message says what was wrong, what was got and what to do.

EffbenchError
├── UsageError              a wrong word, number or path in a question; the command line exits with 2
│   ├── TechniqueError      no such technique, no such option, a value out of range, a malformed pipeline
│   ├── ModelError          no such model, no weights, corrupt or pickled weights
│   ├── TextError           no such text, an empty one, words outside a closed vocabulary
│   ├── TaskError           no such task
│   └── RecordError         a folder that cannot be written, a record that cannot be read
├── PackageError            an optional package is missing; the message says which to install
├── UnfitError              a technique cannot be applied to this system; the reason becomes the row
└── WorkerError             a worker process could not be started
"""


class EffbenchError(Exception):
    """The root of everything that effbench raises on purpose."""


class UsageError(EffbenchError):
    """The question cannot be answered as it was asked."""


class TechniqueError(UsageError):
    """A pipeline names an unknown technique or option, or gives a value that makes no sense."""


class ModelError(UsageError):
    """A model cannot be found or loaded."""


class TextError(UsageError):
    """A text cannot be read or is not made of words the model knows."""


class TaskError(UsageError):
    """An evaluation task is unknown."""


class RecordError(UsageError):
    """A results folder cannot be written, or what lies in it cannot be read."""


class PackageError(EffbenchError):
    """A technique needs a package that is not installed."""


class UnfitError(EffbenchError):
    """A technique cannot be applied to this system; the message is the reason shown in its row."""


class WorkerError(EffbenchError):
    """A worker process could not be started."""


SCARCE = ("not enough memory", "can't allocate memory", "Cannot allocate memory", "std::bad_alloc")
"""What torch's allocator, the system and C++ say where memory is short."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was short. torch says it by its own error on a GPU and by a plain `RuntimeError` on a CPU."""
    kind = type(error).__name__
    return isinstance(error, MemoryError) or kind == "OutOfMemoryError" or any(said in str(error) for said in SCARCE)
