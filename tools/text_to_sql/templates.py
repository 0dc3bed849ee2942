"""Sentence templates of each intent, with ``[first|second]`` alternatives and ``{slots}``.

``{nouns}`` and ``{noun}`` are the things ("singers", "singer"), ``{group}`` the things that satisfy the conditions,
``{each}`` the same after "each", ``{is}`` the conditions as a predicate, ``{keys}`` and ``{key}`` the column that names
the things ("titles").
"""

from __future__ import annotations

SHOW = "[Show|List|Give me|Find|Get|Return|Display|I need|Show me|Please list|Tell me|Fetch]"

SELECT_KEY = (
    "[Which|What] {nouns} {is}?",
    "Which {nouns} {is}?",
    "{show} the {keys} of [all|the|] {group}.",
    "What are the {keys} of [the|all] {group}?",
    "[{show} the|] {keys} of {group}",
    "Name [all|the] {group}.",
    "{group}: what are their {keys}?",
    "I'm looking for {group}, [just|only] the {keys}.",
    "Can you [give me|list] the {keys} of {group}?",
)
SELECT_WHERE = (
    "{keys} of {nouns} where {where}",
    "{show} the {keys} of [all|the] {nouns} where {where}.",
    "{nouns}, {where}: {keys}?",
)
SELECT_COLUMNS = (
    "What is the {columns} of each {each}?",
    "{show} the {plurals} of [all|the|] {group}.",
    "{plurals} of {group}",
    "{show} the {columns} for [every|each] {each}.",
    "For [every|each] {each}, {showlow} the {columns}.",
    "I want to see the {plurals} of {group}.",
)
SELECT_ALL = (
    "{show} [everything|all the data|all we have|every detail] [about|on] {group}.",
    "{show} all columns for [the|all] {group}.",
    "[Full|Complete] [rows|records] of {group}, please.",
    "{show} the [full|complete|entire] [rows|records] [of|for] {group}.",
    "What do we know about {group}? All columns.",
)
COUNT = (
    "How many {nouns} {is}?",
    "How many {group} are there?",
    "[Count|Please count] [the|all|] {group}.",
    "What is the [total |]number of {group}?",
    "[Tell me|Show] how many {nouns} {is}.",
    "[number|count] of {group}",
    "How many {group} do we have?",
    "{group}: how many?",
)
COUNT_EVERYTHING = (
    "How many {nouns} are there [in total|altogether|in the table|]?",
    "What is the total number of {nouns}?",
    "Count [all|the] {nouns}.",
    "total number of {nouns}",
)
AGGREGATE = (
    "What is the {agg} {column} of {group}?",
    "What's the {agg} {column} [for|among|across] {group}?",
    "[Find|Compute|Work out|Calculate|Give me|Show|Tell me] the {agg} {column} of {group}.",
    "{agg} {column} of {group}",
    "For {group}, what is the {agg} {column}?",
)
TWO_AGGREGATES = (
    "What are the {agg} and [the|] {agg2} {column} of {group}?",
    "{show} the {agg} and {agg2} {column} [of|among|for] {group}.",
    "{agg} and {agg2} {column} of {group}",
)
LOOKUP = (
    "What is the {column} of {value}?",
    "What is {value}'s {column}?",
    "{show} the {column} of [the {noun} |]{value}.",
    "{column} of {value}",
    "What {column} does [the {noun} |]{value} have?",
    "[Look up|Check] the {column} [of|for] {value}.",
)
LOOKUP_TWO = (
    "What are the {columns} of {value}?",
    "{show} the {columns} of [the {noun} |]{value}.",
    "{columns} of {value}",
    "For {value}, {showlow} the {columns}.",
)
TOP = (
    "Which {noun} is the {top}?",
    "Which {noun} is {top}?",
    "What is the {key} of the {top} {noun}?",
    "{show} the {key} of the {top} {noun}.",
    "{top} {noun}",
    "Which is the {top} {noun}?",
    "[Find|Name|Tell me] the {top} {noun}.",
)
TOP_WITH = (
    "Which {noun} has {top_of}?",
    "What is the {key} of the {noun} with {top_of}?",
    "{show} the {key} of the {noun} with {top_of}.",
    "[Find|Name|Tell me] the {noun} with {top_of}.",
    "{noun} with {top_of}",
)
TOP_COLUMN = (
    "What is the {column} of the {superlative}?",
    "{show} the {column} of the {superlative}.",
    "{column} of the {superlative}",
)
TOP_OF_GROUP = (
    "Among {group}, [{pronoun}|which one] is the {top}?",
    "Of all {group}, {pronoun} is the {top}?",
    "Which of the {group} is the {top}?",
)
TOP_OF_GROUP_WITH = (
    "Among {group}, [{pronoun}|which one] has {top_of}?",
    "Of all {group}, {pronoun} has {top_of}?",
    "Which of the {group} has {top_of}?",
)
TOP_N = (
    "{show} the {keys} of the {superlatives}.",
    "[Which|What] are the {superlatives}?",
    "{show} the {superlatives}.",
    "{superlatives}",
    "What are the {keys} of the {superlatives}?",
)
SECOND = (
    "Which {noun} is the {nth} {top}?",
    "{show} the {key} of the {nth} {top} {noun}.",
    "{nth} {top} {noun}",
    "What is the {key} of the {nth} {top} {noun}?",
)
SORTED = (
    "{show} the {keys} of [all|the] {group} {sorted}.",
    "{show} [all|the|] {group} {sorted}.",
    "{keys} of {group}, {sorted}",
    "What are the {keys} of [all|the] {group}, {sorted}?",
    "Sort [the|all] {group} {sorted_bare} and {showlow} their {keys}.",
)
DISTINCT = (
    "[Which|What] [different|distinct|unique] {columns} are there [among the {nouns}|for the {nouns}|]?",
    "{show} [every|each] {column} of the {nouns} [once|without repeats].",
    "{show} the [different|distinct|unique] {columns} of [all|the] {nouns}.",
    "[distinct|unique] {columns} of the {nouns}",
    "{columns} of all {nouns}, [no duplicates|without duplicates]",
)
COUNT_DISTINCT = (
    "How many [different|distinct|unique] {columns} [are there among|do we have for] {group}?",
    "Count the [different|distinct|unique] {columns} of {group}.",
    "number of [different|distinct] {columns} among {group}",
)
GROUP_COUNT = (
    "How many {group} are there [per|for each|for every] {column}?",
    "{show} [each|every] {column} and the number of {group}.",
    "For each {column}, how many {group} are there?",
    "[Count|Please count] the {group} [per|for each|by] {column}.",
    "number of {group} [per|by|for each] {column}",
    "{show} the number of {group} [per|for each] {column}.",
)
GROUP_AGGREGATE = (
    "What is the {agg} {number} [of {group} |][per|for each|for every] {column}?",
    "{show} the {agg} {number} of {group} [per|for each|by] {column}.",
    "For [each|every] {column}, {showlow} the {agg} {number} of {group}.",
    "{agg} {number} of {group} [per|by] {column}",
    "{show} [each|every] {column} with the {agg} {number} of its {group}.",
)
HAVING = (
    "Which {columns} have {how} {count} {nouns}?",
    "{show} the {columns} with {how} {count} {nouns}.",
    "{columns} with {how} {count} {nouns}",
    "{show} [every|each] {column} that has {how} {count} {nouns}.",
    "For which {columns} are there {how} {count} {nouns}?",
)
HAVING_AGGREGATE = (
    "Which {columns} have {an_agg} {number} {how} {value}?",
    "{show} the {columns} whose {nouns} have {an_agg} {number} {how} {value}.",
    "{columns} where the {agg} {number} of the {nouns} is {how} {value}",
)
MOST_COMMON = (
    "Which {column} has the {most} {nouns}?",
    "What is the {common} {column} among the {nouns}?",
    "{show} the {column} with the {most} {nouns}.",
    "{common} {column} [of|among] the {nouns}",
    "Which {column} [occurs|appears] {often} [among the {nouns}|in the list of {nouns}]?",
)
COMPARED = (
    "Which {nouns} [are|are all] {comparison}?",
    "{show} the {keys} of [all|the] {nouns} [that are|] {comparison}.",
    "{nouns} {comparison}",
    "What are the {keys} of the {nouns} {comparison}?",
)
COMPARED_NOUN = (
    "Which {nouns} have {comparison_noun}?",
    "{show} the {keys} of [all|the] {nouns} with {comparison_noun}.",
    "{nouns} with {comparison_noun}",
    "Which {nouns} have {comparison_noun}? [Give the {keys}.|{show} the {keys}.]",
)
COUNT_COMPARED = (
    "How many {nouns} have {comparison_noun}?",
    "Count the {nouns} with {comparison_noun}.",
    "number of {nouns} with {comparison_noun}",
)
BOTH = (
    "For [each|every] {child}, {showlow} the {column} and the {key} of the {noun}.",
    "{show} the {column} of [each|every] {child} together with the {key} of the {noun}.",
    "{columns} of the {children}, with the {key} of the {noun}",
)
PER_PARENT = (
    "For each {noun}, {showlow} the {key} and the number of {children}.",
    "{show} the {key} of each {noun} and the number of {children}.",
    "How many {children} are there for each {noun}? Show the {key} and the [number|count].",
    "{show} each {noun}'s {key} [and|with] the number of {children}.",
)
MOST_CHILDREN = (
    "Which {noun} {verb} the {most} {children}?",
    "{show} the {key} of the {noun} that {verb} the {most} {children}.",
    "{noun} with the {most} {children}",
    "What is the {key} of the {noun} with the {most} {children}?",
)
CHILDLESS = (
    "Which {nouns} {verb} no {children}?",
    "{show} the {keys} of [all|the] {nouns} without [any|] {children}.",
    "{nouns} without {children}",
    "{show} the {nouns} that {verb} no {children}.",
    "Which {nouns} have no {children}?",
)
PARENT_WHERE_CHILD = (
    "Which {nouns} {verb} {child}?",
    "{show} the {keys} of [all|the] {nouns} {who} {verb} {child}.",
    "{nouns} {who} {verb} {child}",
    "What are the {keys} of the {nouns} {who} {verb} {child}?",
)
