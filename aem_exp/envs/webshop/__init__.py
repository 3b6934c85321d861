"""WebShop: shopping for products, from the official catalogue or from a generated one.

`world` implements the contract of `aem_exp.envs`; `catalogue` reads products, `search` is BM25, `goals`
scores a purchase, `player` is the scripted expert, `generated` makes catalogues.
"""

from aem_exp.envs.webshop.world import Generated, WebShop

__all__ = ["Generated", "WebShop"]
