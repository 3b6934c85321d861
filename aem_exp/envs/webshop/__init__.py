"""WebShop: shopping for products, from the official catalogue or from a generated one.

`world` and `env` implement the contract of `aem_exp.envs`, and `shop` has the pages. `official_files` finds the official data,
`generated` generates data in the same format, and `catalogue` reads both. `search` is BM25 with Lucene's `analyzer`. `goals`
words goals and scores purchases. `expert` contains the scripted experts, and `vocabulary` is for small policies.

It plays like the original's text environment, without its server, HTML and Java. Known differences from the original
(princeton-nlp/WebShop at 64fa2a5, observation mode text):

- Goals depend on a seed (see `goals`). In the original they differ from process to process.
- `search[<r>]`, `<a>`, `<c>`, `<q>`: the original lists products at random or by hidden fields. Here they are ordinary queries.
- A query that contains the name of a route of the original (search_results, item_page, ...) confuses the original's browser.
  Here it is an ordinary query.
- Characters added after Unicode 9, and zero-width joiners between words, are indexed like their neighbours.
- `nouns: words` takes all words of a title as nouns, while the original uses spaCy. r_type is then approximate.
- A product without title, description or price field is refused when the catalogue is built. The original crashes.

It was compared with the original (search by Anserini 0.14.3, the same tagger) on six catalogues of 1,000 products, half of them
adversarial. All goals, 25,000 pages with their lists of clickable elements, and 700 rewards were equal.
"""

from aem_exp.envs.webshop.world import Generated, WebShop

__all__ = ["Generated", "WebShop"]
