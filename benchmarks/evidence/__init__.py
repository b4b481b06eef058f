"""docs/evidence, made again: the trainings behind its rows, and its tables out of the rows."""
