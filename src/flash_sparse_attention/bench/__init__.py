"""Benchmarks that anyone can repeat: what each part costs on the device at hand, that it is right, and how it compares."""
