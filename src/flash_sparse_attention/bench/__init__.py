"""Benchmarks that anyone can repeat: what each part costs on this device, that it is right, and how it compares."""
