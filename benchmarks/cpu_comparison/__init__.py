"""What ``benchmarks/cpu.py`` is made of: networks, engines, their worker processes, statistics and reports."""
