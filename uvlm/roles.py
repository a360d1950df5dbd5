"""Roles: what a token does in one layer.

Three bits would be *query* (its state is updated), *key* (others see it) and *ffn*. Of the eight combinations four
occur in the literature, and they are nested: who has the ffn is a query, and who is a query is a key. So a role is a
level, and a bit is a comparison: `role >= KEY`, `role >= QUERY`, `role >= DENSE`.
"""

BYPASS = 0  # (0, 0, 0): the state passes the layer unchanged, and nobody sees it
CONTEXT = 1  # (0, 1, 0): seen, but not updated
NO_FFN = 2  # (1, 1, 0): attention only
DENSE = 3  # (1, 1, 1)

KEY, QUERY, FFN = CONTEXT, NO_FFN, DENSE  # the lowest role that has the bit
