"""Students in the formats of other runtimes: written, opened again, and asked."""
