"""How hard the package is to break: faults and random cases in large numbers, and the figures they give.

`python -m reliability run [PART ...]` runs the parts at their full size and writes reliability/results/<part>.json;
`python -m reliability write` writes docs/reliability.md from these. python_tests/ runs every part in a small size.
"""
