"""How fast and how large, side by side with what others offer: ``python -m benchmarks``, or ``make bench``."""
