"""One folder per op: api (checks) -> autograd -> op (schema, selection) -> one backend."""
