"""Plans: the real programs, compiled by the real TPU compiler on a CPU."""
