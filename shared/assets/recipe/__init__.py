"""Training recipe of `pydoc-mini`; run the modules in the order corpus, tokenizer, train, evaluate.

::

    corpus.py ----> data/facts.jsonl, data/prose.jsonl.gz      (checked in)
    tokenizer.py -> pydoc-mini/tokenizer*.json                 (checked in)
    train.py -----> pydoc-mini/{config.json, model.safetensors}
    evaluate.py --> pydoc-mini/{scores.json, README.md}
"""
