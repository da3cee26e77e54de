"""How fast the data side is, and how full its rows are: python -m data_pipelines.benchmark

photos.py makes the data, contenders.py has the ways to read it, packing.py the ways to fill rows.
"""
