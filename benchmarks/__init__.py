"""Measurements anyone can repeat: `python -m benchmarks.run --help`.

run, and a room for each of its subjects: ops, models, host; measure: clocks, records, goals. What needs no GPU: count,
aot, cuda_compile. proof: all that a GPU tells. readme, works, prefer: what is written from the results.
"""

from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
