"""Look at a data folder: python -m data_pipelines.inspect DIR

read.py gathers numbers and sample rows; __main__.py writes them as a page or as JSON.
"""
