"""Benchmarks that anyone can repeat: what each part costs on a device, that it is right, and how it compares."""
