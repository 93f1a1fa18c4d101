"""From shards to batches: index, order, fetch, decode, augment, loader. Import the modules themselves.

Nothing is imported here, so that the builders of `data_tools` can use the index without the loader.
"""
