"""Other tools' training files → a recipe that trains the same, and what became of each of their options.

    axolotl*.py llama_factory*.py trl.py torchtune.py accelerate.py   one tool each: its options, and its own defaults
    options.py     the options of a file: typed, each taken once, so that none is overlooked
    draft.py       the recipe as it grows, and what was mapped, dropped and refused
    datasets.py    paths, splits and formats of data sets, as data.train names them
    tokens.py      tokens that the recipe needs and the tokenizer lacks
    sharding.py    DeepSpeed's and FSDP's settings as `parallelism`
    kinds.py       which tool a file is for

Three rules. An option that changes what is trained is mapped or refused. One that does not is dropped with a word on
what that means. Where a tool's default is not distft's, the recipe states the tool's.
"""
