"""What runs the benchmarks, keeps their results as JSON, and makes the report of them."""
