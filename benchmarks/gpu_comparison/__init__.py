"""What ``benchmarks/gpu.py`` is made of: the device, the check of every bit, peers, rounds, rooflines and reports."""
