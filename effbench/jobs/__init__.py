"""What the workers do, each in its own process. Every job takes JSON and leaves a record.

applying.apply    the dense model -> the pipeline -> a saved system, its cost and its size
scoring.quality   the saved system -> perplexity and divergence, accuracy, cache bytes
timing.speed      the saved system -> its memory, and its time in rounds interleaved with the dense worker's
timing.serve      the dense worker
"""
