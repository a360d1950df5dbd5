"""From image-text files to packs of tokens: shards, image codes, order, packing, loading. Knows nothing of training."""
