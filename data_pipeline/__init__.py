"""From image-text files to packs of tokens: shards, image codes, order, packing. Knows nothing of the trainer."""
