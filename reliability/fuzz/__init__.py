"""Random calls of every public function, each compared with its definition in float64.

draws: shapes, dtypes, memory layouts, values, indices. case: one call, and what must hold for it. adapters, loras,
merges, losses, routing: what is drawn for an op, and its definition. run: how many cases ran to their end.
"""
