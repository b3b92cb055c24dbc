"""Key-value caches of attention layers: a pytree of arrays, or of codes with a scale per token.

cache = kv.init(batch, heads, length, size, store=jq.ArrayConfig(format=jq.INT8))
cache = kv.append(cache, keys, values)  # of a prompt, or of the next token
mixed = kv.attend(query, cache)
"""

from .attend import attend as attend
from .cache import Cache as Cache
from .cache import append as append
from .cache import init as init
