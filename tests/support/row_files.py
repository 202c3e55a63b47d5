"""Rows of benchmarks, and where they come from, as commands of today write them."""

MADE = {
    "date": "2026-11-30T10:00:00+00:00",
    "ironmoe": "0.1.0",
    "commit": "a" * 40,
    "command": "ironmoe bench cpu",
    "machine": {"processor": "AMD EPYC 9654", "cores": 2, "threads": 2, "gpus": []},
    "versions": {"python": "3.11.7", "torch": "2.13.0", "ironmoe": "0.1.0"},
}


def cpu_row(scale=1.0, *, spread=0.9, dtype="float32", shape=(8, 4, 4, 2, 1), runs=9):
    ms = {"ironmoe": 10.0 * scale, "dense": 8.0}
    return {
        "shape": list(shape),
        "dtype": dtype,
        "pass": "forward",
        "milliseconds": ms,
        "fastest": {who: spread * value for who, value in ms.items()},
        "error": {"ironmoe": 1e-7},
        "runs": runs,
    }
