"""Runs the PTX that Triton compiles, on a CPU: what a GPU would run, without one. README.md tells how it is used.

engine/: the executor, in C++. build: compiles it. text, operands, decode*: PTX to what the executor runs. program: a
kernel, and its launches. host: takes the launches of backend="triton". plugin: the package's Triton tests so. gate:
`make ptx`. fuzz, compare*: drawn calls, four implementations of one answer. race: Triton's pipeliner on sm_90.
traffic*: what memory access costs. mutants: is a broken kernel noticed.
"""
