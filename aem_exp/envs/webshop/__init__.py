"""WebShop: shopping for products, from the official catalogue or from a generated one.

`world` and `env` implement the contract of `aem_exp.envs`, `shop` has the pages. `official_files` finds the official data,
`generated` makes data like it, `catalogue` reads either; `search` is BM25 with Lucene's `analyzer`, `goals` words goals
and scores purchases.
`expert` is the scripted expert, `vocabulary` is for small policies.

It plays as the original's text environment does, without its server, HTML and Java. Known differences from the original
(princeton-nlp/WebShop at 64fa2a5, observation mode text):

- goals are drawn from a seed (see `goals`); the original's differ from process to process.
- `search[<r>]`, `<a>`, `<c>`, `<q>`: the original lists products at random or by hidden fields; here they are ordinary queries.
- a query that contains the name of one of the original's routes (search_results, item_page, ...) confuses its browser, not ours.
- characters that Unicode got after version 9, and zero-width joiners between words, are indexed as their neighbours are.
- `nouns: words` takes all words of a title for nouns, where the original asks spaCy: r_type is then approximate.
- a product without title, description or price field is refused when the catalogue is built; the original crashes.

Compared with the original (its search by Anserini 0.14.3, the same tagger) on six catalogues of 1,000 products, half of them
adversarial: all goals were equal, and so were 25,000 pages and lists of what can be clicked, and 700 rewards.
"""

from aem_exp.envs.webshop.world import Generated, WebShop

__all__ = ["Generated", "WebShop"]
