"""The words of the training text: a few lists, and a maker of words that mean nothing."""

from __future__ import annotations

import random

NOUNS = """apple river stone garden window table letter mountain bridge forest candle mirror basket
ladder pocket engine wheel water light paper pencil bottle button camera carpet castle circle cloud
copper cotton desert dinner doctor dragon driver feather finger flower harbor island jacket kettle
kitchen lantern leather lemon market meadow metal morning needle ocean orange painter parrot pepper
planet pillow potato rabbit ribbon rocket saddle sailor salmon school shadow shovel silver singer
spider spoon square summer sunset ticket tiger tower tunnel turtle valley velvet village violin
walnut whistle winter wizard yellow zebra bread butter cheese honey sugar coffee chair floor house
street road train plane ship horse sheep eagle snake whale mouse tree leaf root seed grass sand
storm snow rain wind fire smoke story song dance game music picture number question answer reason
problem language computer program science history world country city family mother father brother
sister friend teacher student farmer baker poet king queen child people person animal recipe weather
book page word name idea money time night day week month year moon star sun sky sea lake""".split()

VERBS = """see make find take give tell ask know think want need like love help show open close
build break carry catch choose clean climb cook count cut draw drink drive eat explain fall feel
follow forget grow hear hold jump keep learn leave listen look lose measure meet move paint play
pull push read ride run sell send sing sleep speak stand start stop study swim teach throw travel
try turn understand visit wait walk wash watch wear win work write describe compare translate
summarize plan fix bake plant repair""".split()

ADJECTIVES = """big small red green blue black white old new young long short high low hot cold warm
cool fast slow good bad kind happy sad quiet loud bright dark soft hard heavy light sweet sour clean
dirty dry wet early late easy strong weak rich poor wide narrow deep round sharp smooth strange
simple famous gentle brave clever honest lazy modern ancient perfect pretty proud""".split()

NAMES = """Anna Ben Clara David Emma Felix Grace Henry Iris Jack Karen Leo Maria Nina Oscar Paul
Quinn Rosa Sam Tina Uma Victor Wendy Xavier Yara Zoe Alice Bob Carol Daniel Elena Frank Gina Hugo
Ingrid Jonas Kira Lucas Mona Noah Olga Peter Rita Simon Tara Ulrich Vera Walter Amir Bea Chen Dora
Eva Farid Gustav Hana Ivan Julia Kofi Lena Mateo Nora Omar Priya Ravi Sofia Tomas Yuki Alex Chris
John Mary James Linda Robert Sarah Michael Laura Thomas Kevin Amy Diana Eric George Jane
Luis""".split()

THINGS = """color animal city food song book number game drink flower country fruit sport season
movie word""".split()

TOPICS = """the weather|the capital of France|quantum physics|how to bake bread|the moon|a good book
|the history of Rome|how engines work|the meaning of life|your favorite color|the stock market
|what time it is|how to learn to swim|the best city to visit|how old the earth is
|why the sky is blue
|who wrote Hamlet|a joke|a poem about winter|the news of today|how to fix a bicycle|python code
|a recipe for soup|the tallest mountain|football|how birds fly|the speed of light""".replace(
    "\n", ""
).split("|")

ONSETS = "b c d f g h j k l m n p r s t v w z br cr dr fl gr kl pl pr st tr sh ch th".split()
VOWELS = "a e i o u a e i o u ai ea oo ou".split()
CODAS = ["", "", "", "n", "r", "s", "t", "l", "m", "k", "d", "x", "nd", "st"]


KNOWN = frozenset(NOUNS + VERBS + ADJECTIVES + NAMES)


def made_up(rng: random.Random) -> str:
    """A pronounceable word of one to three syllables."""
    return "".join(
        rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)
        for _ in range(rng.choice((1, 2, 2, 3)))
    )


def letters(rng: random.Random) -> str:
    """A word of random letters: no token of it can be guessed from the others."""
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 7)))


def word(rng: random.Random) -> str:
    """A lower-case word, known or made up."""
    kind = rng.random()
    if kind < 0.6:
        return rng.choice(rng.choice((NOUNS, VERBS, ADJECTIVES)))
    return made_up(rng) if kind < 0.9 else letters(rng)


def name(rng: random.Random) -> str:
    """A first name, known or made up."""
    return rng.choice(NAMES) if rng.random() < 0.6 else made_up(rng).capitalize()


def sentence(rng: random.Random) -> str:
    """Plain English of no consequence."""
    noun, verb, adjective = rng.choice(NOUNS), rng.choice(VERBS), rng.choice(ADJECTIVES)
    other, topic = rng.choice(NOUNS), rng.choice(TOPICS)
    form = rng.choice(
        (
            "How do I {verb} a {adjective} {noun}?",
            "Tell me about {topic}.",
            "Tell me about the {adjective} {noun}.",
            "Why is the {noun} so {adjective}?",
            "Can you {verb} the {noun} for me?",
            "What do you think about {topic}?",
            "Is a {noun} more {adjective} than a {other}?",
            "Write a story about a {adjective} {noun} and a {other}.",
            "Where can I {verb} a {noun}?",
            "Please {verb} the {other} with a {noun}.",
            "Do you know {topic}?",
            "Explain {topic} to a child.",
            "What is a {adjective} {noun}?",
            "Who will {verb} the {noun} in the {other}?",
            "I want to {verb} my {adjective} {noun}.",
            "What is {topic}?",
            "Which {noun} should I {verb} first?",
        )
    )
    return form.format(noun=noun, verb=verb, adjective=adjective, other=other, topic=topic)
